"""Records from where a user has them: embedded, JSON, CSV, Parquet, text, folders of them, Hugging Face datasets."""

from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from pathlib import Path

from configs.errors import InputError
from configs.schema.data import SourceSettings
from trainer.data.embedded import EMBEDDED
from trainer.data.reading.counts import ReadCounts
from trainer.data.reading.csv_rows import read_csv
from trainer.data.reading.files import opened, source_files
from trainer.data.reading.hugging_face import read_hugging_face
from trainer.data.reading.json_rows import read_json, read_jsonl
from trainer.data.reading.parquet_rows import read_parquet
from trainer.data.reading.rows import Row, Wanted, pick, said
from trainer.data.reading.text_rows import read_text_file

__all__ = ["ReadCounts", "Row", "read_rows"]


def read_rows(source: SourceSettings, columns: Iterable[str], counts: ReadCounts) -> Iterator[Row]:
    """Yields the rows of a source that have text, with the columns asked for and no other one.

    Characters that were lost are replaced and counted.

    Args:
        source: where to read.
        columns: further columns that every row must have (``silo``, ``unit``).
        counts: filled while reading; it says where the last row stands, too.

    Raises:
        InputError: the file is missing, unreadable or malformed, a column is not there, or a text is none.
    """
    for row, found in all_columns(source, [source.text, *columns], counts):
        row[source.text] = text = said(row[source.text], source.text, counts.where, found)
        found.empty = int(text is None)
        counts.add(found)
        if not found.empty:
            yield row


def all_columns(source: SourceSettings, columns: Iterable[str], counts: ReadCounts) -> Iterator[tuple[Row, ReadCounts]]:
    """Yields every row as its file has it, with the columns asked for, and an account of it that says one row so far.

    That is not added to ``counts``, which is told of files and places alone.
    """
    names = tuple(dict.fromkeys(columns))
    text = source.text if source.text in names else ""
    for row in _open(source, Wanted(names, source.encoding, counts, text)):
        yield row, ReadCounts(rows=1)


def _open(source: SourceSettings, wanted: Wanted) -> Iterator[Row]:
    kind, _, name = source.source.partition(":")
    if kind == "embedded":
        return _read_embedded(name, wanted)
    if kind == "hf":
        return read_hugging_face(name, source.split, wanted)
    return _read_path(Path(source.source), wanted)


def _read_embedded(name: str, wanted: Wanted) -> Iterator[Row]:
    if name not in EMBEDDED:
        raise InputError(f"embedded:{name}: no such embedded text; there is {', '.join(EMBEDDED)}")
    for number, row in enumerate(EMBEDDED[name](), 1):
        wanted.counts.place = (f"embedded:{name}, row", number)
        yield pick(row, wanted)


def _read_path(path: Path, wanted: Wanted) -> Iterator[Row]:
    wanted.counts.files = source_files(path)
    for file in wanted.counts.files:
        with opened(file.path) as content:
            yield from _READERS[file.kind](content, str(file.path), wanted)


_READERS: dict[str, Callable[[BufferedReader, str, Wanted], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_text_file,
    ".md": read_text_file,
}
