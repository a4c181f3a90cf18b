"""Columns of Arrow, which Parquet files and Hugging Face datasets are read as."""

import re
from collections.abc import Iterator
from typing import Any

from configs.errors import InputError
from trainer.data.reading.rows import Row, Wanted, check_columns, no_text

BATCH_ROWS = 1024


def check_schema(schema: Any, name: str, wanted: Wanted) -> None:
    """The wanted columns are there, and the text's holds texts.

    Raises:
        InputError: they are not.
    """
    check_columns(schema.names, wanted.columns, name)
    if wanted.text and not _is_text(kind := schema.field(wanted.text).type):
        raise no_text(name, wanted.text, f"the type {type_name(kind)}")


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    checks = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    return any(check(kind) for check in checks)


def type_name(kind: Any) -> str:
    """A type without what a file says of it: names of nested fields, and of zones, are the file's content."""
    found = re.match(r"\w+", str(kind))
    return found[0] if found else "unknown"


def rows_of_batch(batch: Any, first: int, name: str, wanted: Wanted) -> Iterator[Row]:
    """Yields the rows of a record batch or a table.

    Args:
        batch: it.
        first: the number of its first row in the source.
        name: the source's.
        wanted: the columns to read.

    Raises:
        InputError: a value can't be read.
    """
    columns = {column: batch.column(column) for column in wanted.columns}
    found = _rows(columns)
    if found is None:
        column = next((one for one in columns if _rows({one: columns[one]}) is None), wanted.columns[0])
        raise InputError(
            f"{name}, rows {first} to {first + batch.num_rows - 1}: column {column!r} holds a value of the type "
            f"{type_name(columns[column].type)} that can't be read (texts have to be UTF-8, times within the years 1 "
            "to 9999); write it anew, as text"
        )
    place = f"{name}, row"
    for number, row in enumerate(found, first):
        wanted.counts.place = (place, number)
        yield row


def _rows(columns: dict[str, Any]) -> list[Row] | None:
    """The rows as Python's values; None where there is one that Python has no value for.

    Nothing is raised from here: pyarrow's errors repeat the value.
    """
    import pyarrow as pa

    try:
        rows: list[Row] = pa.table({name: _plain(column) for name, column in columns.items()}).to_pylist()
    except Exception:
        return None
    return rows


def _plain(column: Any) -> Any:
    """Without categories, which would be looked up value by value."""
    from pyarrow import types

    return column.cast(column.type.value_type) if types.is_dictionary(column.type) else column
