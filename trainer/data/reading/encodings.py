"""Bytes to text. A file's byte order mark says how it is encoded, else the settings do; its content never does.

A guess from the content would make what one record says depend on the others in its file. So the content can only lead
to a refusal, and a few stray bytes are replaced where they stand.
"""

import codecs
from collections.abc import Iterator
from io import BufferedReader, BytesIO, RawIOBase, TextIOWrapper
from typing import Any

from configs.errors import InputError
from trainer.data.reading import rows
from trainer.data.reading.counts import LOST
from trainer.data.reading.rows import too_large

_MARKS = (  # UTF-16's mark is the beginning of UTF-32's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_ONE_RECORD = "a text file is one record: cut it into several"
_BEGINNING = 2**20  # bytes; a file is judged by them before anything of it is used
_FEW, _STRAY = 3, 1e-3  # invalid places that any file may have, and their share of a file's characters
_STRAY_NULS = 0.02  # share; UTF-16 of every script has more, by its blanks and line ends alone


def read_lines(file: BufferedReader, name: str, encoding: str, newline: str) -> Iterator[str]:
    """The lines of a file, with their ends; ``LOST`` is in place of bytes that its encoding can't read.

    Args:
        file: at its beginning.
        name: for messages.
        encoding: how it is encoded if it has no byte order mark.
        newline: what ends a line, as for ``open``.

    Raises:
        InputError: the file is in another encoding, or a line is too large for a record.
    """
    text, judged = _decoded(file, name, encoding, newline)
    number = 0
    while line := text.readline(rows.LARGEST_RECORD + 1):
        number += 1
        if len(line) > rows.LARGEST_RECORD:
            raise too_large(f"{name}, line {number}", "write one record per line")
        judged.add(line)
        yield line
    judged.check()


def read_text(file: BufferedReader, name: str, encoding: str, hint: str = _ONE_RECORD) -> str:
    """A whole file's text, like ``read_lines``; ``hint`` says what to do where it is too large.

    Raises:
        InputError: the file is in another encoding, or too large for one record.
    """
    text, judged = _decoded(file, name, encoding, "")
    content = text.read(rows.LARGEST_RECORD + 1)
    if len(content) > rows.LARGEST_RECORD:
        raise too_large(name, hint)
    judged.add(content)
    judged.check()
    return content


def first_character(file: BufferedReader, name: str, encoding: str) -> str:
    """The first one that is no white space, or none where that is further on; the file stays at its beginning.

    Raises:
        InputError: the file's encoding is not known.
    """
    beginning = file.peek()
    return codecs.getincrementaldecoder(_codec(beginning, name, encoding))("replace").decode(beginning).lstrip()[:1]


def _decoded(file: BufferedReader, name: str, encoding: str, newline: str) -> tuple[TextIOWrapper, "_Judged"]:
    """A file's text, once its beginning has been judged."""
    beginning = file.read(_BEGINNING)
    codec = _codec(beginning, name, encoding)
    judged = _Judged(name, codec)
    judged.add(codecs.getincrementaldecoder(codec)(_REPLACING).decode(beginning, final=len(beginning) < _BEGINNING))
    judged.check()
    again = BufferedReader(_Again(beginning, file))
    return TextIOWrapper(again, codec, _REPLACING, newline), _Judged(name, codec)


class _Again(RawIOBase):
    """A file from its beginning, which was read before; not every decompressor can go back."""

    def __init__(self, beginning: bytes, rest: BufferedReader) -> None:
        self._beginning, self._rest = BytesIO(beginning), rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._beginning.read(len(buffer)) or self._rest.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def _codec(beginning: bytes, name: str, encoding: str) -> str:
    for mark, codec in _MARKS:
        if beginning.startswith(mark):
            return codec
    codec = codecs.lookup(encoding).name
    if beginning and codec in ("utf-16", "utf-32"):
        raise InputError(
            f"{name}: has no byte order mark; say which bytes come first: "
            f'encoding = "{codec}-le" (as Windows writes it) or "{codec}-be"'
        )
    return codec


class _Judged:
    """Counts whether a file can be in the encoding that it is read by."""

    def __init__(self, name: str, encoding: str) -> None:
        self._name, self._encoding = name, encoding
        self._characters = self._beyond_ascii = self._lost = self._nuls = 0

    def add(self, text: str) -> None:
        self._characters += len(text)
        self._nuls += text.count("\0")
        if not text.isascii():
            lost = text.count(LOST)
            self._lost += lost
            self._beyond_ascii += len(text) - len(text.encode("ascii", "ignore")) - lost

    def check(self) -> None:
        """Refuses the file if it can't. Without numbers, since it may be private.

        Raises:
            InputError: it is in another encoding.
        """
        if self._nuls > max(_FEW, _STRAY_NULS * self._characters):
            raise InputError(
                f"{self._name}: has NUL bytes all over, as UTF-16 without a byte order mark has; set "
                'encoding = "utf-16-le" (or "utf-16-be", "utf-32-le", "utf-32-be"), if it is text at all'
            )
        if self._lost > max(_FEW, _STRAY * self._characters, self._beyond_ascii):
            raise InputError(
                f"{self._name}: not {self._encoding}, beyond a few stray bytes; set the encoding that it was written "
                'in, for instance encoding = "latin-1" or "cp1252", or write it anew in UTF-8'
            )


def _mark(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return LOST, error.end


_REPLACING = "siloweave.lost"
codecs.register_error(_REPLACING, _mark)
