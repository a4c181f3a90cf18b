"""Records from where a user has them: embedded, JSON, CSV, Parquet, text, folders of them, Hugging Face datasets."""

import codecs
import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.schema.data import SourceSettings
from trainer.data.embedded import EMBEDDED
from trainer.data.reading.files import SourceFiles, opened, source_files

Row = dict[str, Any]
LARGEST_ARRAY_BYTES = 256 * 2**20  # of a JSON array, without compression
_HEAD_BYTES = 4096


@dataclass
class ReadCounts:
    """What was seen while reading; for the reader's own eyes (counts and names of private data don't leave a silo).

    ``files`` is of the last source that was a path.
    """

    rows: int = 0
    replaced_utf8: int = 0
    empty: int = 0
    without_unit: int = 0
    files: SourceFiles | None = field(default=None, compare=False)


def read_rows(source: SourceSettings, columns: Iterable[str], counts: ReadCounts) -> Iterator[Row]:
    """Yields the rows of a source that have text; invalid UTF-8 is replaced and counted.

    Args:
        source: where to read.
        columns: further columns that every row must have (``silo``, ``unit``).
        counts: filled while reading.

    Raises:
        InputError: the file is missing or unreadable, or a column is not there.
    """
    required = [source.text, *columns]
    for row in _open(source, counts):
        for column in required:
            if column not in row:
                raise InputError(
                    f"{source.source}: no column {column!r} in row {counts.rows + 1}; it has {sorted(row)}: "
                    "name the right one in the configuration"
                )
        counts.rows += 1
        text = row[source.text]
        if isinstance(text, str) and text.strip():
            yield {**row, source.text: _well_formed(text, counts)}
        else:
            counts.empty += 1


def _open(source: SourceSettings, counts: ReadCounts) -> Iterator[Row]:
    kind, _, name = source.source.partition(":")
    if kind == "embedded":
        if name not in EMBEDDED:
            raise InputError(f"{source.source}: no such embedded text; there is {', '.join(EMBEDDED)}")
        return EMBEDDED[name]()
    if kind == "hf":
        return _read_hugging_face(name, source.split)
    return _read_path(Path(source.source), counts)


def _read_hugging_face(name: str, split: str) -> Iterator[Row]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, split=split)
    except Exception as error:
        # The hub client and the builders raise a dozen unrelated types; each means that this input can't be read.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"hf:{name} (split {split!r}): can't be loaded ({reason}); check the name and the network"
        ) from error
    yield from dataset


def hugging_face_folders() -> list[Path]:
    """Where the libraries behind ``hf:`` keep copies of what they load, and code and tokens to load it with."""
    from datasets import config
    from huggingface_hub import constants

    names = ("HF_CACHE_HOME", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "DOWNLOADED_DATASETS_PATH")
    places = [getattr(config, name) for name in (*names, "EXTRACTED_DATASETS_PATH")]
    return [
        Path(place) for place in (*places, constants.HF_HUB_CACHE, constants.HF_XET_CACHE, constants.HF_ASSETS_CACHE)
    ]


def _read_path(path: Path, counts: ReadCounts) -> Iterator[Row]:
    counts.files = source_files(path)
    for file in counts.files:
        yield from _READERS[file.kind](file.path, counts)


def _well_formed(text: str, counts: ReadCounts) -> str:
    """JSON can hold half a character (a lone surrogate), which no encoding takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        counts.replaced_utf8 += 1
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _decode(content: bytes, counts: ReadCounts) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        counts.replaced_utf8 += 1
        return content.decode("utf-8", errors="replace")


def _read_json(path: Path, counts: ReadCounts) -> Iterator[Row]:
    """An array of objects, or JSON Lines."""
    with opened(path) as file:
        head = file.read(_HEAD_BYTES)
        array = head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        content = head + file.read(LARGEST_ARRAY_BYTES) if array else b""
    if not array:
        yield from _read_jsonl(path, counts)
        return
    if len(content) > LARGEST_ARRAY_BYTES:
        raise InputError(
            f"{path}: an array of more than {LARGEST_ARRAY_BYTES >> 20} MiB, which has to be in memory at once; write "
            "JSON Lines, one object per line"
        )
    try:
        rows = json.loads(_decode(content.removeprefix(codecs.BOM_UTF8), counts))
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not JSON; write an array of objects, or one object per line") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{path}: item {number} of its array is not a JSON object")
        yield row


def _read_jsonl(path: Path, counts: ReadCounts) -> Iterator[Row]:
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(_decode(line, counts))
            except json.JSONDecodeError as error:
                raise InputError(f"{path}: line {number} is not JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}: line {number} is not a JSON object; write one object per line")
            yield row


def _read_csv(path: Path, counts: ReadCounts) -> Iterator[Row]:
    with opened(path) as file:
        lines = (_decode(line, counts) for line in file)
        try:
            yield from csv.DictReader(lines, strict=True)
        except csv.Error as error:
            raise InputError(f"{path}: not CSV ({error})") from None


def _read_parquet(path: Path, _: ReadCounts) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: not Parquet ({error})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: a text column is not UTF-8; write it again with UTF-8 text") from None


def _read_text(path: Path, counts: ReadCounts) -> Iterator[Row]:
    with opened(path) as file:
        content = file.read()
    yield {"text": _decode(content, counts), "file": path.name, "folder": path.parent.name}


_READERS: dict[str, Callable[[Path, ReadCounts], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".md": _read_text,
}
