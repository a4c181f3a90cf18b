"""Text files: a file is a record."""

from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from trainer.data.reading.encodings import read_text
from trainer.data.reading.rows import Row, Wanted, pick


def read_text_file(file: BufferedReader, name: str, wanted: Wanted) -> Iterator[Row]:
    """Yields the one record of a text file: ``text``, and its ``file``'s and ``folder``'s names.

    Raises:
        InputError: another column is wanted, or the file is too large.
    """
    wanted.counts.place = (f"{name}, record", 1)
    path = Path(name)
    text = read_text(file, name, wanted.encoding)
    yield pick({"text": text, "file": path.name, "folder": path.parent.name}, wanted)
