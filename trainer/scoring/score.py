"""What a task measures of a model's answers to records that may be read in the clear."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from trainer.metrics.measures import Measures
from trainer.tasks.task import AnsweringTask, Encoded, Prediction, Task


class Answer(NamedTuple):
    """A model's answer to a record, and the right one, or all that are right."""

    given: Prediction
    right: Any


@dataclass(frozen=True)
class Score:
    """Measures of records, so that scores of several silos add up.

    Attributes:
        measures: what each column is.
        rows: of the task's measures, record by record, (N, S).
        units: whose each record is, by number, where it was asked for.
        answers: to each record, where they were asked for.
    """

    measures: Measures
    rows: npt.NDArray[np.float64]
    units: tuple[int, ...] = ()
    answers: tuple[Answer, ...] = field(default=(), repr=False)

    @property
    def records(self) -> int:
        """Number of records."""
        return len(self.rows)

    @property
    def figures(self) -> dict[str, Any]:
        """The task's figures; None where nothing was scored, or where the model's loss is not finite."""
        sums = [value if math.isfinite(value) else math.nan for value in self.rows.sum(axis=0)]
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in self.measures.figures(sums).items()
        }

    @property
    def main(self) -> float | None:
        """The figure that people compare first."""
        value: float | None = self.figures[self.measures.main]
        return value

    def __add__(self, other: "Score") -> "Score":
        own = max(self.units, default=-1) + 1  # nobody is in two silos
        units = (*self.units, *(own + unit for unit in other.units))
        return Score(self.measures, np.vstack([self.rows, other.rows]), units, self.answers + other.answers)


def score(model: Any, task: Task, records: Sequence[Encoded], micro_batch_size: int) -> Score:
    """Scores records one by one (no sequence crosses records); a truncated record counts as far as it was read."""
    rows = np.zeros((len(records), task.measures.num_sums))
    with torch.no_grad():
        for places in places_by_length(records, micro_batch_size):
            rows[places] = task.record_scores(model, [records[place] for place in places]).double().cpu().numpy()
    return Score(task.measures, rows)


def score_in_full(
    model: Any, task: Task, units: Sequence[Sequence[Encoded]], micro_batch_size: int, max_new_tokens: int | None
) -> Score:
    """The same of units, each with its examples, and what the model answers to them.

    Args:
        model: in evaluation mode.
        task: what a record is to it.
        units: what is scored.
        micro_batch_size: records at once; texts are written one by one.
        max_new_tokens: most tokens that it writes for a record, where it writes; None: it is not asked for answers.
    """
    records = [example for unit in units for example in unit]
    found = score(model, task, records, micro_batch_size)
    owners = tuple(number for number, unit in enumerate(units) for _ in unit)
    answers: tuple[Answer, ...] = ()
    if records and max_new_tokens is not None and isinstance(task, AnsweringTask):
        answers = _answers(model, task, records, micro_batch_size, max_new_tokens)
    return Score(found.measures, found.rows, owners, answers)


def _answers(
    model: Any, task: AnsweringTask, records: Sequence[Encoded], micro_batch_size: int, max_new_tokens: int
) -> tuple[Answer, ...]:
    given: dict[int, Prediction] = {}
    with torch.no_grad():
        for places in places_by_length(records, micro_batch_size):
            found = task.predictions(model, [records[place] for place in places], max_new_tokens)
            given |= zip(places, found, strict=True)
    return tuple(Answer(given[place], right) for place, right in enumerate(task.references(records)))


def places_by_length(records: Sequence[Encoded], micro_batch_size: int) -> Iterator[list[int]]:
    """Where records of like length stand, a micro-batch at a time: less padding, the same scores."""
    order = sorted(range(len(records)), key=lambda place: len(records[place].ids))
    for start in range(0, len(order), micro_batch_size):
        yield order[start : start + micro_batch_size]
