"""JSON: one object per line, or an array of objects."""

import json
from collections.abc import Iterator
from io import BufferedReader
from typing import Any

from configs.errors import InputError
from trainer.data.reading.encodings import first_character, read_lines, read_text
from trainer.data.reading.rows import Row, Wanted, pick

_BLANKS = " \t\r\n"  # JSON's own


def read_jsonl(file: BufferedReader, name: str, wanted: Wanted) -> Iterator[Row]:
    """Yields a row per line; blank lines are none.

    Raises:
        InputError: a line is no JSON object, has a key twice, or lacks a column.
    """
    place = f"{name}, line"
    for number, line in enumerate(read_lines(file, name, wanted.encoding, "\n"), 1):
        content = line.strip(_BLANKS)
        if not content:
            continue
        wanted.counts.place = (place, number)
        row, fault = parsed(content)
        if fault:
            raise InputError(f"{place} {number} {fault}")
        yield pick(_object_of(row, f"{place} {number}"), wanted)


def read_json(file: BufferedReader, name: str, wanted: Wanted) -> Iterator[Row]:
    """Yields a row per object of an array, which is in memory at once; or per line, where the file is no array.

    Raises:
        InputError: as ``read_jsonl``; or the array is too large.
    """
    if first_character(file, name, wanted.encoding) != "[":
        yield from read_jsonl(file, name, wanted)
        return
    hint = "an array is in memory at once: write one object per line instead"
    rows, fault = parsed(read_text(file, name, wanted.encoding, hint).strip(_BLANKS))
    if fault:
        raise InputError(f"{name}: {fault}")
    for number, row in enumerate(rows, 1):
        wanted.counts.place = (f"{name}, object", number)
        yield pick(_object_of(row, wanted.counts.where), wanted)


def _object_of(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{where} is not a JSON object; write one object per line")
    return row


def parsed(text: str) -> tuple[Any, str]:
    """A text's value, and what is wrong with it. Not raised from here: the parser's errors hold all of it."""
    try:
        value, end = _DECODER.raw_decode(text)  # half the time of decode, which looks for blanks again
    except json.JSONDecodeError as error:
        return None, f"is not JSON ({error.msg}, at character {error.pos + 1}); write one object per line"
    except _TwiceError:
        return None, "has a key twice in one object, so that one value would be lost; give each its own name"
    except RecursionError:
        return None, "is nested too deeply to be read; leave that column out"
    except ValueError:  # the one that is left: Python's limit on the digits of an integer
        return None, "has a number of too many digits; write it as text, in double quotes"
    return value, "" if end == len(text) else "is not a JSON object, or more than one; write one object per line"


class _TwiceError(Exception):
    """A key stands twice in an object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _TwiceError
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
