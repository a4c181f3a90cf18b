"""JSONL: one JSON object per line."""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from configs.errors import InputError
from trainer.data.reading.decoding import read_lines
from trainer.data.reading.rows import Row, Wanted, pick

_BLANKS = " \t\r\n"  # JSON's own


def read_jsonl(file: BinaryIO, name: str, wanted: Wanted) -> Iterator[Row]:
    """Yields a row per line; blank lines are none.

    Raises:
        InputError: a line is no JSON object, has a key twice, or lacks a column.
    """
    place = f"{name}, line"
    for number, line in enumerate(read_lines(file, name, wanted.counts), 1):
        content = line.strip(_BLANKS)
        if not content:
            continue
        wanted.counts.place = (place, number)
        row, fault = _parse(content)
        if fault:
            raise InputError(f"{place} {number} {fault}")
        yield pick(row, wanted)


def _parse(content: str) -> tuple[Any, str]:
    """A line's object, and what is wrong with it. Not raised from here: the parser's errors hold the whole line."""
    try:
        row, end = _DECODER.raw_decode(content)  # half the time of decode, which looks for blanks again
    except json.JSONDecodeError as error:
        return None, f"is not JSON ({error.msg}, at character {error.pos + 1}); write one object per line"
    except _TwiceError:
        return None, "has a key twice in one object, so that one value would be lost; give each its own name"
    except RecursionError:
        return None, "is nested too deeply to be read; leave that column out"
    except ValueError:  # the one that is left: Python's limit on the digits of an integer
        return None, "has a number of too many digits; write it as text, in double quotes"
    if end < len(content) or not isinstance(row, dict):
        return None, "is not a JSON object, or more than one; write one object per line"
    return row, ""


class _TwiceError(Exception):
    """A key stands twice in an object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _TwiceError
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
