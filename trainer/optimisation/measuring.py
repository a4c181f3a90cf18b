"""How fast models are, beside each other."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from trainer.tasks.task import Task

_BATCH, _TURNS = 16, 7


def seconds_a_batch(models: Sequence[Any], task: Task) -> list[float]:
    """Each model's median time for one batch of made-up examples; they take turns, so that a busy machine slows all."""
    longest = max(task.synthetic(), key=lambda example: len(example.ids))
    batch = task.collate(task.made_up(task.shape(longest), _BATCH))
    took: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for _ in range(1 + _TURNS):
            for model, times in zip(models, took, strict=True):
                begun = time.perf_counter()
                task.record_losses(model, batch)
                times.append(time.perf_counter() - begun)
    return [statistics.median(times[1:]) for times in took]  # the first turn warms up
