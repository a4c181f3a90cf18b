"""Tables of rows by a file's suffix: JSONL, CSV or Parquet, read with every column and written whole or not at all."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from configs.errors import InputError
from trainer.data.reading import csv_rows, json_rows
from trainer.data.reading.encodings import read_lines
from trainer.data.reading.files import opened

Numbered = tuple[int, dict[str, Any] | str]
"""A record's line, or its row in Parquet; and its columns, or what is wrong with it."""
KINDS = (".jsonl", ".csv", ".parquet")
_BLANK = " \t\r\n"


def check_kind(path: Path, option: str) -> None:
    """Refuses a file of another kind.

    Raises:
        InputError: its suffix is none of ``KINDS``.
    """
    if path.suffix not in KINDS:
        raise InputError(f"{option} {path}: of what kind it is, its suffix says; give one of {', '.join(KINDS)}")


def rows_of(path: Path) -> Iterator[Numbered]:
    """Every record of a file, in its order; one that can't be read is said, and the others follow.

    Raises:
        InputError: the file can't be read at all, or a table of it.
    """
    with opened(path) as file:
        yield from _READERS[path.suffix](file, path)


def count_of(path: Path) -> int:
    """How many records ``rows_of`` gives of a file, bad ones included, without parsing what needn't be.

    Raises:
        InputError: the file can't be read at all, or a table of it.
    """
    if path.suffix == ".csv":  # a record may be several lines
        return sum(1 for _ in rows_of(path))
    with opened(path) as file:
        if path.suffix == ".jsonl":
            return sum(1 for line in read_lines(file, str(path), "utf-8", "\n") if line.strip(_BLANK))
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return int(pq.ParquetFile(file).metadata.num_rows)
        except (pa.ArrowException, OSError):
            raise _damaged(path) from None


def _damaged(path: Path) -> InputError:
    """Of Parquet, whose own words may quote the content."""
    return InputError(f"{path}: damaged, or no Parquet file; write it again")


def _jsonl(file: Any, path: Path) -> Iterator[Numbered]:
    for number, line in enumerate(read_lines(file, str(path), "utf-8", "\n"), 1):
        if content := line.strip(_BLANK):
            row, fault = json_rows.parsed(content)
            if not fault and not isinstance(row, dict):
                fault = "is not a JSON object; write one object per line"
            yield number, fault or row


def _csv(file: Any, path: Path) -> Iterator[Numbered]:
    records = csv_rows.records(read_lines(file, str(path), "utf-8", ""), str(path))
    _, header = next(records, (1, []))
    if len(set(header)) < len(header) or not header:
        raise InputError(f"{path}, line 1: is no header, or has a name twice; give each column its own name")
    for number, record in records:
        whole = len(record) == len(header)
        fault = f"has {len(record)} fields, and the header has {len(header)}"
        yield number, dict(zip(header, record, strict=True)) if whole else fault


def _parquet(file: Any, path: Path) -> Iterator[Numbered]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        for one in table.schema_arrow:
            if not _as_json(one.type):
                raise InputError(
                    f"{path}: column {one.name!r} is of the type {one.type}; make a text of it, or drop it"
                )
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pa.ArrowException, OSError):
        raise _damaged(path) from None


def _as_json(kind: Any) -> bool:
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        return _as_json(kind.value_type)
    if types.is_struct(kind):
        return all(_as_json(kind.field(number).type) for number in range(kind.num_fields))
    plain = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return any(is_kind(kind) for is_kind in (*plain, types.is_null))


_READERS: dict[str, Callable[[Any, Path], Iterator[Numbered]]] = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}


def write_rows(path: Path, rows: Callable[[], Iterator[Mapping[str, Any]]], columns: Sequence[str]) -> None:
    """Writes a table; a file of that name is there whole or not at all.

    Args:
        path: of the file.
        rows: gives them, each time from the first one.
        columns: of the table.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            _WRITERS[path.suffix](file, rows(), columns)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def json_line(value: object) -> bytes:
    """A value on a line of its own, with every script as it is."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _write_jsonl(file: BinaryIO, rows: Iterator[Mapping[str, Any]], _columns: Sequence[str]) -> None:
    file.writelines(json_line(row) for row in rows)


def _write_csv(file: BinaryIO, rows: Iterator[Mapping[str, Any]], columns: Sequence[str]) -> None:
    text = io.TextIOWrapper(file, "utf-8", errors="backslashreplace", newline="")
    table = csv.writer(text)
    table.writerow(columns)
    for row in rows:
        table.writerow([_cell(row.get(column)) for column in columns])
    text.flush()
    text.detach()


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def _write_parquet(file: BinaryIO, rows: Iterator[Mapping[str, Any]], columns: Sequence[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = list(rows)
    try:
        table = pa.table({column: pa.array([row.get(column) for row in found]) for column in columns})
    except (pa.ArrowException, UnicodeError):
        raise InputError("a column holds values of several types, which Parquet can't; write .jsonl instead") from None
    pq.write_table(table, file)


_WRITERS = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}
