"""The loss of each record, for whoever attacks or scores a model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.scoring.score import places_by_length
from trainer.tasks.task import Encoded, Task


def record_losses(model: Any, task: Task, records: Sequence[Encoded], micro_batch_size: int) -> npt.NDArray[np.float64]:
    """Loss of each record in nats per token, (N,), in the records' order."""
    losses = np.zeros(len(records))
    with torch.no_grad():
        for places in places_by_length(records, micro_batch_size):
            batch = task.collate([records[place] for place in places])
            losses[places] = task.record_losses(model, batch).double().cpu().numpy()
    return losses
