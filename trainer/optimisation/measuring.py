"""How large models are, and how fast beside each other."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from trainer.optimisation.quantising import stored
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


def sizes(model: Any) -> dict[str, float]:
    """Bytes of a model's weights, as they lie on disk, and the share of them that is zero."""
    weights = [stored(value) for value in model.parameters()]
    count = sum(parts[0].numel() for parts in weights)
    zeros = sum(int((parts[0] == 0).sum()) for parts in weights)
    return {"bytes": sum(part.nbytes for parts in weights for part in parts), "zeros": zeros / count}
