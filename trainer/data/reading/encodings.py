"""Bytes to text. A file's byte order mark says how it is encoded, else the settings do; its content never does.

A guess from the content would make what one record says depend on the others in its file. So the content can only lead
to a refusal, and a few stray bytes are replaced where they stand.
"""

import codecs
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import BinaryIO

from configs.errors import InputError

LOST = "\udc80"
"""Stands for invalid bytes until ``mended`` has counted them. Half a character, as no encoding gives."""

_MARKS = (  # UTF-16's mark is the beginning of UTF-32's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BEGINNING = 2**20  # bytes; a file is judged by them before anything of it is used
_FEW, _STRAY = 3, 1e-3  # invalid places that any file may have, and their share of a file's characters
_STRAY_NULS = 0.02  # share; UTF-16 of every script has more, by its blanks and line ends alone


def lines_of(file: BinaryIO, path: Path, encoding: str, newline: str) -> Iterator[str]:
    """The lines of a file, with their ends; ``LOST`` is in place of bytes that its encoding can't read.

    Args:
        file: opened for bytes, at its beginning.
        path: its name, for messages.
        encoding: how it is encoded if it has no byte order mark.
        newline: what ends a line, as for ``open``.

    Raises:
        InputError: the file is in another encoding.
    """
    beginning = file.read(_BEGINNING)
    file.seek(0)
    name = _encoding(beginning, path, encoding)
    judged = _Judged(path, name)
    judged.add(codecs.getincrementaldecoder(name)(_REPLACING).decode(beginning, final=len(beginning) < _BEGINNING))
    judged.check()
    judged = _Judged(path, name)
    with TextIOWrapper(file, name, _REPLACING, newline) as text:
        for line in text:
            judged.add(line)
            yield line
    judged.check()


def _encoding(beginning: bytes, path: Path, encoding: str) -> str:
    for mark, name in _MARKS:
        if beginning.startswith(mark):
            return name
    name = codecs.lookup(encoding).name
    if beginning and name in ("utf-16", "utf-32"):
        raise InputError(
            f"{path}: has no byte order mark; say which bytes come first: "
            f'encoding = "{name}-le" (as Windows writes it) or "{name}-be"'
        )
    return name


class _Judged:
    """Counts whether a file can be in the encoding that it is read by."""

    def __init__(self, path: Path, encoding: str) -> None:
        self._path, self._encoding = path, encoding
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
                f"{self._path}: has NUL bytes all over, as UTF-16 without a byte order mark has; set "
                'encoding = "utf-16-le" (or "utf-16-be", "utf-32-le", "utf-32-be"), if it is text at all'
            )
        if self._lost > max(_FEW, _STRAY * self._characters, self._beyond_ascii):
            raise InputError(
                f"{self._path}: not {self._encoding}, beyond a few stray bytes; set the encoding that it was written "
                'in, for instance encoding = "latin-1" or "cp1252", or write it anew in UTF-8'
            )


def _mark(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return LOST, error.end


_REPLACING = "siloweave.lost"
codecs.register_error(_REPLACING, _mark)
