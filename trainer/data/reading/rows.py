"""What the readers of all formats share: which columns are read, what is counted, and the words of a refusal.

A refusal names the file, the line, columns that the configuration names, and numbers of what was found. It never has
what stands in the file, nor a name of a column there: the first line of a file without a header is a record.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isnan
from typing import Any

from configs.errors import InputError
from trainer.data.reading.counts import ReadCounts, mended

LARGEST_RECORD = 2**27
"""Characters of one record. A quote that is never closed, or a file without line ends, would fill the memory."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What a reader is asked for.

    Attributes:
        columns: those that every row has and that are read; no other one is looked at.
        encoding: of text without a byte order mark.
        counts: told of files and places.
        text: the one of them that holds texts; empty for none.
    """

    columns: tuple[str, ...]
    encoding: str
    counts: ReadCounts
    text: str


def pick(row: Mapping[str, Any], wanted: Wanted) -> Row:
    """The wanted columns of a row.

    Raises:
        InputError: one is not there.
    """
    try:
        return {name: row[name] for name in wanted.columns}
    except KeyError as error:
        raise _no_column(error.args[0], list(row), wanted.counts.where) from None


def check_columns(found: list[str], columns: Iterable[str], where: str, hint: str = "") -> None:
    """Each wanted column stands there once.

    Raises:
        InputError: it does not.
    """
    for name in columns:
        if found.count(name) > 1:
            raise InputError(f"{where}: column {name!r} stands there {found.count(name)} times; give each its own name")
        if name not in found:
            raise _no_column(name, found, where, hint)


def _no_column(name: str, found: list[str], where: str, hint: str = "") -> InputError:
    if name.strip().casefold() in {other.strip().casefold() for other in found}:
        hint = "one differs from it in case or blanks alone; "
    return InputError(
        f"{where}: no column {name!r} among the {len(found)} there; {hint}name the right one in the configuration"
    )


def text_of(value: Any, column: str, where: str) -> str:
    """A row's text; empty where it is missing.

    Raises:
        InputError: the value is no text.
    """
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and isnan(value)):  # what programs write for a missing text
        return ""
    raise no_text(where, column, _KINDS.get(type(value), f"a value of the type {type(value).__name__}"))


def said(value: Any, column: str, where: str, counts: ReadCounts) -> str | None:
    """A text that is not blank, with what was lost in it replaced and counted; None where there is none.

    Raises:
        InputError: as ``text_of``.
    """
    text = mended(text_of(value, column, where), counts)
    return None if not text or text.isspace() else text


def no_text(where: str, column: str, kind: str) -> InputError:
    """The refusal of a text column that holds something else."""
    return InputError(
        f"{where}: the text column {column!r} holds {kind}; give a column whose values are texts (of a list of "
        "messages, make one text per record first)"
    )


_KINDS = {
    list: "a list",
    dict: "an object",
    bool: "a truth value",
    int: "a number",
    float: "a number",
    bytes: "bytes",
}


def too_large(where: str, hint: str) -> InputError:
    """The refusal of a record beyond ``LARGEST_RECORD``."""
    return InputError(f"{where}: a record of more than {LARGEST_RECORD:,} characters; {hint}")
