"""One silo's local steps of one round, from the shared adapter to an update.

They are taken with DP, or without it for the comparison on public data and where an aggregator adds the noise.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from logging import Logger
from typing import Any, get_args

import numpy as np
import torch

from configs.errors import InputError, PolicyRefusal
from configs.schema.federated import ClippingMethod, Optimizer
from federated.adapters.arrays import Arrays
from federated.adapters.warm_model import put_on
from privacy.distributed.distributed import DistributedNoise
from privacy.mechanism.adam_bc import AdamBC
from privacy.mechanism.dp_sgd import PrivateTraining
from privacy.mechanism.sampler import one_example_each, sample
from privacy.mechanism.streams import Streams
from privacy.plan import PrivacyPlan
from privacy.secagg.encoding import Words
from trainer.augmentation import Augment
from trainer.device import beside
from trainer.models.adapters import adapter_weights, trainable
from trainer.tasks.task import Encoded, Task, by_length

OPTIMIZERS = get_args(Optimizer)


@dataclass(frozen=True)
class LocalSettings:
    """What changes quality or speed, but no guarantee.

    Attributes:
        learning_rate: of the optimizer.
        optimizer: a name in ``OPTIMIZERS``; fresh in every round (its moments see noised gradients only).
        micro_batch_size: units processed at once.
        clipping: how per-record gradients are clipped.
        proximal_mu: FedProx (Li et al. 2020): pull of each step towards the adapter that came.
        correction: SCAFFOLD: what is added to each step's gradient; empty for nothing.
        augment: what a step changes in the words that it reads; None: nothing.
    """

    learning_rate: float
    optimizer: str
    micro_batch_size: int
    clipping: ClippingMethod
    proximal_mu: float = 0.0
    correction: Arrays = field(default_factory=dict)
    augment: Augment | None = None


class PrivateUpdate:
    """The clipped, noised update of one round, made ready: what can fail without private records is done.

    Raises:
        InputError: with this adapter the model's per-record gradients can't be proved.
        ValueError: the adapter doesn't fit the model.
    """

    def __init__(self, plan: PrivacyPlan, model: Any, task: Task, adapter: Arrays, settings: LocalSettings) -> None:
        self._model, self._before = model, put_on(model, adapter)
        with beside(model):
            self._ready(plan, task, settings)

    def _ready(self, plan: PrivacyPlan, task: Task, settings: LocalSettings) -> None:
        model = self._model
        self._training = PrivateTraining(
            plan,
            model,
            _optimizer(settings, model, self._before, plan.noise_std / plan.expected_batch_size),
            unit_losses=lambda batch: task.record_losses(model, task.collate(batch)),
            shape_of=task.shape,
            made_up=task.made_up,
            micro_batch_size=settings.micro_batch_size,
            synthetic=task.synthetic(),
            method=settings.clipping,
            augment=settings.augment,
        )
        self._training.prove()

    def run(self, streams: Streams, units: Sequence[Sequence[Encoded]]) -> Arrays:
        """Adapter after minus adapter before."""
        with beside(self._model):
            self._training.run(streams, units)
        return _difference(self._model, self._before)

    def share(self, streams: Streams, units: Sequence[Sequence[Encoded]], noise: DistributedNoise) -> Words:
        """This silo's part of one step over all silos' samples, with its share of the noise, for a secure sum.

        Args:
            streams: the charge's; dither and noise have one that is theirs alone.
            units: the private units.
            noise: of the step.

        Raises:
            NotFinite: a value of the sum is not finite.
        """
        with beside(self._model):
            sums = self._training.clipped_sum(streams, units)
        flat = np.concatenate([sums[name].cpu().numpy().reshape(-1) for name in sorted(sums)])
        return noise.encode(flat, streams.generator("share", 0))


def proved(
    plan: PrivacyPlan, model: Any, task: Task, adapter: Arrays, settings: LocalSettings, log: Logger
) -> PrivateUpdate:
    """A round's steps, ready to be charged: all that a request alone can make fail lies behind.

    Raises:
        PolicyRefusal: the proof fails with the request's adapter; only the silo's own log has the reason.
    """
    try:
        return PrivateUpdate(plan, model, task, adapter, settings)
    except InputError as error:
        log.warning("no proof with a request's adapter: %s", error)
        raise PolicyRefusal.of(
            "adapter", "values with which the start-up proof fails", "values for which it holds"
        ) from None


def public_update(
    plan: PrivacyPlan,
    streams: Streams,
    model: Any,
    task: Task,
    adapter: Arrays,
    units: Sequence[Sequence[Encoded]],
    settings: LocalSettings,
) -> Arrays:
    """The same steps on the same batches without clipping and without noise: for data declared public only."""
    batches = (
        one_example_each(streams, step, units, sample(plan, streams, step, len(units)), settings.augment)
        for step in range(plan.terms.steps_per_round)
    )
    return plain_update(batches, plan.expected_batch_size, model, task, adapter, settings)


def plain_update(
    batches: Iterable[Sequence[Encoded]],
    expected_batch_size: float,
    model: Any,
    task: Task,
    adapter: Arrays,
    settings: LocalSettings,
) -> Arrays:
    """Ordinary steps, one per batch: what comes out is not private."""
    before = put_on(model, adapter)
    optimizer = _optimizer(settings, model, before, noise_std=0.0)
    model.train()
    with beside(model):
        for batch in batches:
            for micro in by_length(batch, settings.micro_batch_size):
                loss = task.record_losses(model, task.collate(micro)).sum() / expected_batch_size
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return _difference(model, before)


def _optimizer(
    settings: LocalSettings, model: Any, before: dict[str, torch.Tensor], noise_std: float
) -> torch.optim.Optimizer:
    """A fresh optimizer; without noise there is nothing to take off Adam's second moment."""
    parameters, rate = list(trainable(model).values()), settings.learning_rate
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=rate)
    elif settings.optimizer == "adam_bc" and noise_std:
        optimizer = AdamBC(parameters, rate, noise_std)
    else:
        optimizer = torch.optim.Adam(parameters, lr=rate)
    if settings.proximal_mu or settings.correction:
        optimizer.register_step_pre_hook(lambda *_: _add_shared_terms(settings, model, before))
    return optimizer


def _add_shared_terms(settings: LocalSettings, model: Any, before: dict[str, torch.Tensor]) -> None:
    """Adds what FedProx and SCAFFOLD add to a step's gradient, after clipping and noise.

    It is made of released values alone, the adapter as it was and as noised steps moved it, and of what the request
    brought: it needs no noise of its own, and under the noise it would only be clipped.
    """
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            term = settings.proximal_mu * (parameter - before[name])
            if settings.correction:
                term += torch.from_numpy(settings.correction[name]).to(parameter.device)
            parameter.grad = term if parameter.grad is None else parameter.grad + term


def _difference(model: Any, before: dict[str, torch.Tensor]) -> Arrays:
    moved = {name: (weight - before[name]).cpu() for name, weight in adapter_weights(model).items()}
    return {name: difference.numpy().astype(np.float32) for name, difference in moved.items()}
