"""Bits per character of records under a model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer.tasks.task import Encoded, Task, by_length


@dataclass(frozen=True)
class Score:
    """Sums over records, so that scores of several silos add up.

    Attributes:
        nats: negative log-likelihood.
        characters: characters scored.
        records: records scored.
    """

    nats: float
    characters: int
    records: int

    @property
    def bits_per_char(self) -> float | None:
        """Bits per character; None where nothing was scored, or where the model's loss is not finite."""
        if not self.characters or not math.isfinite(self.nats):
            return None
        return self.nats / math.log(2) / self.characters

    def __add__(self, other: "Score") -> "Score":
        return Score(self.nats + other.nats, self.characters + other.characters, self.records + other.records)


def score(model: Any, task: Task, records: Sequence[Encoded], micro_batch_size: int) -> Score:
    """Scores records one by one (no sequence crosses records); a truncated record counts as far as it was read."""
    nats = 0.0
    with torch.no_grad():
        for micro in by_length(records, micro_batch_size):
            nats += task.record_nats(model, task.collate(micro)).double().sum().item()
    return Score(nats, sum(record.characters for record in records), len(records))
