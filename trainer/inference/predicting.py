"""A file's records with a model's answers: in their order, and going on where an earlier try was ended.

Answers collect in a file beside the output, chunk by chunk. What is asked together depends on the chunk alone, so the
output is the same, byte for byte, however often it was interrupted.
"""

import json
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from configs.errors import InputError
from configs.storage.files import digest_file, digest_json, write_failure
from trainer.inference import part_files
from trainer.inference.asking import Asking
from trainer.inference.tables import Numbered, check_kind, count_of, json_line, rows_of, write_rows
from trainer.tasks.task import Encoded, Prediction

CHUNK = 256
ANSWER, PROBABILITIES = "prediction", "probabilities"
_DIGITS = 6
Answered = Callable[[Path, int], Generator[list[dict[str, Any]]]]


@dataclass(frozen=True)
class Predicted:
    """What came of a file.

    Attributes:
        records: in the file.
        bad: of them, without an answer; each has a line in the file ``bad_file``.
        resumed: of them, answered by earlier tries.
        bad_file: where they are listed; None where there are none.
    """

    records: int
    bad: int
    resumed: int
    bad_file: Path | None


def predict(
    asking: Asking,
    labels: Sequence[str],
    source: Path,
    output: Path,
    asked_by: Mapping[str, Any],
    on_progress: Callable[[int, int], None] = lambda _done, _of: None,
    by: Answered | None = None,
) -> Predicted:
    """Answers a file's records.

    Args:
        asking: gives the answers.
        labels: the task's, of which an answer's probabilities are.
        source: ``.jsonl``, ``.csv`` or ``.parquet``.
        output: the same, where nothing is yet.
        asked_by: model and settings: an earlier try goes on only with the same ones.
        on_progress: told how many records are done, and how many there are.
        by: answers the source's chunks from a record on, in their order, elsewhere; None: this process does.

    Raises:
        InputError: the source can't be read or lacks a column, the output exists or is being made by another command,
            or its earlier try had other input or settings.
        SiloweaveError: the output can't be written.
    """
    check_kind(source, "--input")
    check_kind(output, "--output")
    if output.exists():
        raise InputError(f"{output}: exists; give a path where nothing is yet, by --output")
    _check_columns(source, asking)
    total = count_of(source)
    part, bad = output.with_name(f"{output.name}.part"), output.with_name(f"{output.name}.bad.jsonl")
    try:
        with part.open("a+b") as file:
            part_files.lock(file, output)
            identity = digest_json({**asked_by, "input": digest_file(source), "chunk": CHUNK})
            resumed = part_files.resumed(file, identity, part, CHUNK)
            on_progress(resumed, total)
            answered = by(source, resumed) if by else here(asking, labels, chunks(source, resumed))
            with closing(answered):  # an error may be kept with all that its frames hold: workers' cores, too
                _go_on(file, answered, resumed, lambda done: on_progress(done, total))
            faults = _finish(part, bad, output)
            part.unlink()
    except OSError as error:
        raise write_failure(output, error) from None
    return Predicted(total, faults, resumed, bad if faults else None)


def _check_columns(source: Path, asking: Asking) -> None:
    """A table whose columns are wrong is refused before anything is done; lines of JSON have columns of their own."""
    _, first = next(rows_of(source), (0, ""))
    if source.suffix == ".jsonl" or isinstance(first, str):
        return
    if missing := [column for column in asking.columns if column not in first]:
        raise InputError(f"{source}: no column {missing[0]!r}; name the right one by --column FIELD=COLUMN")
    if fault := _taken(first):
        raise InputError(f"{source}: {fault}")


def _taken(row: Mapping[str, Any]) -> str:
    name = next((name for name in (ANSWER, PROBABILITIES) if name in row), "")
    return name and f"has a column {name!r} already; rename it"


def chunks(source: Path, begun: int) -> Iterator[list[Numbered]]:
    """The records that are asked together, from a record on."""
    left = islice(rows_of(source), begun, None)
    while chunk := list(islice(left, CHUNK)):
        yield chunk


def here(asking: Asking, labels: Sequence[str], asked: Iterable[Sequence[Numbered]]) -> Generator[list[dict[str, Any]]]:
    """The lines that answer chunks, in their order: a record with its answer, or why it has none."""
    return (_answered(asking, labels, chunk) for chunk in asked)


def _go_on(
    file: BinaryIO, answered: Iterator[list[dict[str, Any]]], begun: int, on_done: Callable[[int], None]
) -> None:
    for lines in answered:
        file.writelines(map(json_line, lines))
        file.flush()
        os.fsync(file.fileno())
        begun += len(lines)
        on_done(begun)


def _answered(asking: Asking, labels: Sequence[str], chunk: Sequence[Numbered]) -> list[dict[str, Any]]:
    read = [_read(asking, one) for one in chunk]
    answers = iter(asking.answers([one for one in read if isinstance(one, Encoded)]))
    return [
        {"line": number, "error": one} if isinstance(one, str) else {"row": _row(row, next(answers), labels)}
        for (number, row), one in zip(chunk, read, strict=True)
    ]


def _read(asking: Asking, record: Numbered) -> Encoded | str:
    number, row = record
    where = f"line {number}"
    if fault := row if isinstance(row, str) else _taken(row):
        return f"{where} {fault}"
    try:
        return asking.example(cast("dict[str, Any]", row), where)
    except InputError as error:
        return str(error)


def _row(row: Any, answer: Prediction, labels: Sequence[str]) -> dict[str, Any]:
    found = {**row, ANSWER: answer.answer if isinstance(answer.answer, str) else list(answer.answer)}
    if answer.probabilities:
        found[PROBABILITIES] = by_label(answer, labels)
    return found


def by_label(answer: Prediction, labels: Sequence[str]) -> dict[str, float | None]:
    """An answer's probabilities, of which JSON can hold each: None is one that is no number."""
    known = (round(one, _DIGITS) if math.isfinite(one) else None for one in answer.probabilities)
    return dict(zip(labels, known, strict=True))


def _finish(part: Path, bad: Path, output: Path) -> int:
    """Writes both files; the output comes last. Returns how many records have no answer."""
    columns: dict[str, None] = {}
    faults = 0
    for line in _lines(part):
        faults += "error" in line
        columns.update(dict.fromkeys(line.get("row", {})))
    last = [name for name in (ANSWER, PROBABILITIES) if columns.pop(name, 0) is None]
    bad.unlink(missing_ok=True)
    if faults:
        write_rows(bad, lambda: (line for line in _lines(part) if "error" in line), ())
    write_rows(output, lambda: (line["row"] for line in _lines(part) if "row" in line), [*columns, *(last or [ANSWER])])
    return faults


def _lines(part: Path) -> Iterator[dict[str, Any]]:
    with part.open("rb") as file:
        yield from map(json.loads, islice(file, 1, None))
