"""Bytes to text. What is no UTF-8 is replaced and counted."""

from collections.abc import Iterator
from functools import partial
from typing import BinaryIO

from trainer.data.reading import rows
from trainer.data.reading.rows import ReadCounts, too_large

_BYTE_ORDER_MARK = "\ufeff"


def read_text(file: BinaryIO, name: str, counts: ReadCounts) -> str:
    """A whole file's text.

    Raises:
        InputError: it is too large for one record.
    """
    content = file.read(rows.LARGEST_RECORD + 1)
    if len(content) > rows.LARGEST_RECORD:
        raise too_large(name, "a text file is one record: cut it into several")
    return _decode(content, counts).removeprefix(_BYTE_ORDER_MARK)


def read_lines(file: BinaryIO, name: str, counts: ReadCounts) -> Iterator[str]:
    """A file's lines, with their ends.

    Raises:
        InputError: one is too large for a record.
    """
    largest = rows.LARGEST_RECORD
    for number, line in enumerate(iter(partial(file.readline, largest + 1), b""), 1):
        if len(line) > largest:
            raise too_large(f"{name}, line {number}", "write one record per line")
        text = _decode(line, counts)
        yield text.removeprefix(_BYTE_ORDER_MARK) if number == 1 else text


def _decode(content: bytes, counts: ReadCounts) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        counts.replaced_utf8 += 1
        return content.decode("utf-8", errors="replace")
