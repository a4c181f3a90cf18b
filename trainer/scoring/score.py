"""What a task measures of a model's answers to records that may be read in the clear."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.tasks.measures import Measures
from trainer.tasks.task import Encoded, Task, by_length


@dataclass(frozen=True)
class Score:
    """Sums over records, so that scores of several silos add up.

    Attributes:
        measures: what each sum is.
        sums: of the task's measures, (S,).
        records: records scored.
    """

    measures: Measures
    sums: npt.NDArray[np.float64]
    records: int

    @property
    def figures(self) -> dict[str, Any]:
        """The task's figures; None where nothing was scored, or where the model's loss is not finite."""
        sums = [value if math.isfinite(value) else math.nan for value in self.sums]
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
        return Score(self.measures, self.sums + other.sums, self.records + other.records)


def score(model: Any, task: Task, records: Sequence[Encoded], micro_batch_size: int) -> Score:
    """Scores records one by one (no sequence crosses records); a truncated record counts as far as it was read."""
    sums = np.zeros(task.measures.num_sums)
    with torch.no_grad():
        for micro in by_length(records, micro_batch_size):
            sums += task.record_scores(model, micro).double().sum(dim=0).numpy()
    return Score(task.measures, sums, len(records))
