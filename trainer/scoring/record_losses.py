"""The loss of each record, for whoever attacks or scores a model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.tasks.task import Encoded, Task


def record_losses(model: Any, task: Task, records: Sequence[Encoded], micro_batch_size: int) -> npt.NDArray[np.float64]:
    """Loss of each record in nats per token, (N,), in the records' order."""
    order = sorted(range(len(records)), key=lambda index: len(records[index].ids))
    losses = np.zeros(len(records))
    with torch.no_grad():
        for start in range(0, len(order), micro_batch_size):
            indices = order[start : start + micro_batch_size]
            batch = task.collate([records[index] for index in indices])
            losses[indices] = task.record_losses(model, batch).double().numpy()
    return losses
