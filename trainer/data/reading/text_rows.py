"""Text files: a file is a record."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from trainer.data.reading.decoding import read_text
from trainer.data.reading.rows import Row, Wanted, pick


def read_text_file(file: BinaryIO, name: str, wanted: Wanted) -> Iterator[Row]:
    """Yields the one record of a text file: ``text``, and its ``file``'s and ``folder``'s names.

    Raises:
        InputError: another column is wanted, or the file is too large.
    """
    wanted.counts.place = (f"{name}, record", 1)
    path = Path(name)
    yield pick({"text": read_text(file, name, wanted.counts), "file": path.name, "folder": path.parent.name}, wanted)
