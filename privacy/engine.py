"""DP-SGD (Abadi et al. 2016), one step as one block: sample, forward, backward, clip, accumulate, noise, step.

Everything that the steps of a charge may reveal has been charged before the first sample is drawn.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

from privacy.clipping import clipping
from privacy.noise import noised
from privacy.plan import PrivacyPlan
from privacy.sampler import poisson_sample
from privacy.streams import Streams

Unit = TypeVar("Unit")


def train_privately(
    plan: PrivacyPlan,
    streams: Streams,
    model: Any,
    optimizer: torch.optim.Optimizer,
    units: Sequence[Unit],
    *,
    micro_batches: Callable[[Sequence[Unit]], Iterable[Sequence[Unit]]],
    unit_losses: Callable[[Sequence[Unit]], torch.Tensor],
    synthetic: Sequence[Unit],
) -> None:
    """Runs the steps of one charge on the trainable parameters of a model.

    Args:
        plan: everything the guarantee depends on.
        streams: the charge's random streams.
        model: modules whose per-record gradients Opacus knows.
        optimizer: any torch optimizer over the trainable parameters.
        units: the private units.
        micro_batches: cuts a batch for memory and speed; the result doesn't depend on it.
        unit_losses: loss of each unit, shape (B,), each a function of that unit alone.
        synthetic: made-up units for the start-up proof that per-record gradients are right.

    Raises:
        InputError: the model has parameters whose per-record gradients are wrong or unknown.
    """
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    model.train()  # Opacus records nothing in evaluation mode; adapters have no dropout
    with clipping(model, plan.request.max_grad_norm) as clipper:
        clipper.probe(unit_losses, synthetic)
        for step in range(plan.request.steps_per_round):
            # 1. Every unit is in the batch with probability q; the batch may be empty.
            batch = [units[index] for index in poisson_sample(plan, streams, step, len(units))]
            # 2. Forward, backward and clipping, micro-batch by micro-batch.
            for micro in micro_batches(batch):
                clipper.accumulate(unit_losses(micro))
            # 3. Noise once on the sum, then the public normaliser.
            for name, clipped_sum in clipper.take().items():
                release = noised(clipped_sum, plan, streams, step, name)
                parameters[name].grad = release / plan.expected_batch_size
            # 4. From here on only noised values are seen.
            optimizer.step()
            optimizer.zero_grad()
