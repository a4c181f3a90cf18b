"""One silo's local steps of one round, from the shared adapter to an update.

With DP for a silo, and without for the comparison on public data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch

from configs.schema import ClippingMethod, Optimizer
from federated.adapters import Arrays
from privacy.engine import PrivateTraining
from privacy.optimizers import AdamBC
from privacy.plan import PrivacyPlan
from privacy.sampler import sample
from privacy.streams import Streams
from trainer.models import adapter_weights, load_adapter_weights, trainable
from trainer.tasks import CausalTask, Encoded, by_length

OPTIMIZERS = get_args(Optimizer)


@dataclass(frozen=True)
class LocalSettings:
    """What changes quality or speed, but no guarantee.

    Attributes:
        learning_rate: of the optimizer.
        optimizer: a name in ``OPTIMIZERS``; fresh in every round (its moments see noised gradients only).
        micro_batch_size: units processed at once.
        clipping: how per-record gradients are clipped.
    """

    learning_rate: float
    optimizer: str
    micro_batch_size: int
    clipping: ClippingMethod


def private_update(
    plan: PrivacyPlan,
    streams: Streams,
    model: Any,
    task: CausalTask,
    adapter: Arrays,
    records: Sequence[Encoded],
    settings: LocalSettings,
) -> Arrays:
    """The clipped, noised update of one round: adapter after minus adapter before.

    Raises:
        ValueError: the adapter doesn't fit the model.
    """
    before = _load(model, adapter)
    optimizer = _optimizer(settings, model, plan.noise_std / plan.expected_batch_size)
    PrivateTraining(
        plan,
        streams,
        model,
        optimizer,
        records,
        micro_batches=lambda batch: by_length(batch, settings.micro_batch_size),
        unit_losses=lambda batch: task.record_losses(model, task.collate(batch)),
        synthetic=_synthetic(task),
        method=settings.clipping,
    ).run()
    return _difference(model, before)


def public_update(
    plan: PrivacyPlan,
    streams: Streams,
    model: Any,
    task: CausalTask,
    adapter: Arrays,
    records: Sequence[Encoded],
    settings: LocalSettings,
) -> Arrays:
    """The same steps on the same batches without clipping and without noise: for data declared public only."""
    before = _load(model, adapter)
    optimizer = _optimizer(settings, model, noise_std=0.0)
    model.train()
    for step in range(plan.request.steps_per_round):
        batch = [records[index] for index in sample(plan, streams, step, len(records))]
        for micro in by_length(batch, settings.micro_batch_size):
            loss = task.record_losses(model, task.collate(micro)).sum() / plan.expected_batch_size
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return _difference(model, before)


def _optimizer(settings: LocalSettings, model: Any, noise_std: float) -> torch.optim.Optimizer:
    """A fresh optimizer; without noise there is nothing to take off Adam's second moment."""
    parameters, rate = list(trainable(model).values()), settings.learning_rate
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate)
    if settings.optimizer == "adam_bc" and noise_std:
        return AdamBC(parameters, rate, noise_std)
    return torch.optim.Adam(parameters, lr=rate)


def _synthetic(task: CausalTask) -> list[Encoded]:
    """Made-up units of different lengths: nothing private is needed to prove that clipping is right."""
    return [task.encode(" ".join(f"{word}" for word in range(start, start + 3 + start))) for start in range(3)]


def _load(model: Any, adapter: Arrays) -> dict[str, torch.Tensor]:
    weights = {name: torch.from_numpy(array) for name, array in adapter.items()}
    load_adapter_weights(model, weights)
    return weights


def _difference(model: Any, before: dict[str, torch.Tensor]) -> Arrays:
    return {name: (weight - before[name]).numpy().astype(np.float32) for name, weight in adapter_weights(model).items()}
