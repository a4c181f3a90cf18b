"""Records from where a user has them: embedded, JSONL, CSV, Parquet, text, folders of them, Hugging Face datasets."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.schema.data import SourceSettings
from configs.storage.files import unreadable
from trainer.data.embedded import EMBEDDED
from trainer.data.reading.counts import ReadCounts, mended
from trainer.data.reading.encodings import lines_of

Row = dict[str, Any]


def read_rows(source: SourceSettings, columns: Iterable[str], counts: ReadCounts) -> Iterator[Row]:
    """Yields the rows of a source that have text; what can't be read of it is replaced and counted.

    Args:
        source: where to read.
        columns: further columns that every row must have (``silo``, ``unit``).
        counts: filled while reading.

    Raises:
        InputError: the file is missing or unreadable, or a column is not there.
    """
    for row, found in all_rows(source, columns):
        counts.add(found)
        if not found.empty:
            yield row


def all_rows(source: SourceSettings, columns: Iterable[str]) -> Iterator[tuple[Row, ReadCounts]]:
    """As ``read_rows``, but for each row, also without text, and with what was seen in it."""
    required = [source.text, *columns]
    for number, row in enumerate(_open(source), 1):
        for column in required:
            if column not in row:
                raise InputError(
                    f"{source.source}: no column {column!r} in row {number}; it has {sorted(row)}: "
                    "name the right one in the configuration"
                )
        found, text = ReadCounts(rows=1), row[source.text]
        if isinstance(text, str) and text.strip():
            yield {**row, source.text: mended(text, found)}, found
        else:
            found.empty = 1
            yield row, found


def _open(source: SourceSettings) -> Iterator[Row]:
    kind, _, name = source.source.partition(":")
    if kind == "embedded":
        if name not in EMBEDDED:
            raise InputError(f"{source.source}: no such embedded text; there is {', '.join(EMBEDDED)}")
        return EMBEDDED[name]()
    if kind == "hf":
        return _read_hugging_face(name, source.split)
    return _read_path(Path(source.source), source.encoding)


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


def _read_path(path: Path, encoding: str) -> Iterator[Row]:
    try:
        yield from _read_files(path, encoding)
    except PermissionError as error:
        raise InputError(unreadable(Path(error.filename or path))) from None


def _read_files(path: Path, encoding: str) -> Iterator[Row]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _READERS)
        if not files:
            raise InputError(f"{path}: no {', '.join(_READERS)} file below this folder")
    elif path.suffix in _READERS:
        files = [path]
    else:
        raise InputError(
            f"{path}: unknown kind of file; give {', '.join(_READERS)}, a folder, embedded:NAME or hf:NAME"
        )
    for file in files:
        try:
            yield from _READERS[file.suffix](file, encoding)
        except FileNotFoundError:
            raise InputError(f"{file}: no such file") from None
        except PermissionError:
            raise  # as those above, where the path itself was looked at
        except OSError as error:
            raise InputError(f"{file}: can't be read ({error})") from None


def _read_jsonl(path: Path, encoding: str) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(lines_of(file, path, encoding, "\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}: line {number} is not JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}: line {number} is not a JSON object; write one object per line")
            yield row


def _read_csv(path: Path, encoding: str) -> Iterator[Row]:
    with path.open("rb") as file:
        try:
            yield from csv.DictReader(lines_of(file, path, encoding, ""), strict=True)
        except csv.Error as error:
            raise InputError(f"{path}: not CSV ({error})") from None


def _read_parquet(path: Path, _: str) -> Iterator[Row]:
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


def _read_text(path: Path, encoding: str) -> Iterator[Row]:
    with path.open("rb") as file:
        text = "".join(lines_of(file, path, encoding, ""))
    yield {"text": text, "file": path.name, "folder": path.parent.name}


_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".md": _read_text,
}
