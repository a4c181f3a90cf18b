"""DP-SGD (Abadi et al. 2016), one step as one block: sample, forward, backward, clip, accumulate, noise, step.

Everything that the steps of a charge may reveal has been charged before the first sample is drawn.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from configs.schema.federated import ClippingMethod
from privacy.clipping.clipping import LARGEST_NORM, SMALLEST_NORM, Clipper, clipping
from privacy.clipping.independence import Together
from privacy.clipping.self_check import prove_per_record_gradients
from privacy.mechanism.noise import noised
from privacy.mechanism.sampler import one_example_each, sample
from privacy.mechanism.streams import Streams
from privacy.plan import PrivacyPlan

Unit = TypeVar("Unit")
_NORM_RATE = 0.2  # eta of Andrew et al. 2021
_FARTHEST_NORM = 1000.0


@dataclass
class PrivateTraining(Generic[Unit]):
    """The steps of one charge on the trainable parameters of a model.

    All that needs neither private units nor the charge is here, and ``prove`` proves it: a caller can charge after it.

    Attributes:
        plan: everything the guarantee depends on.
        model: its trainable parameters belong to layers that the clipping method knows.
        optimizer: any torch optimizer over the trainable parameters.
        unit_losses: loss of each unit, shape (B,), each a function of that unit alone; the units are of one shape.
        shape_of: everything about a unit that decides the shape of its computation: its padded length, for instance.
        made_up: gives so many made-up units of a shape, all different, to prove that they may be computed together.
        synthetic: made-up units of several shapes for the start-up proof that per-record gradients are right.
        micro_batch_size: most units at once, for memory and speed; changes no bit of the result.
        method: how per-record gradients are formed.
        augment: what a step changes in a unit's example, by draws that are this unit's own; None: nothing. Of the
            changed example, as of any other, ``shape_of`` says all that decides the shape of its computation.
    """

    plan: PrivacyPlan
    model: Any
    optimizer: torch.optim.Optimizer
    unit_losses: Callable[[Sequence[Unit]], torch.Tensor]
    shape_of: Callable[[Unit], Hashable]
    made_up: Callable[[Any, int], Sequence[Unit]]
    synthetic: Sequence[Unit]
    micro_batch_size: int = 16
    method: ClippingMethod = "bookkeeping"
    augment: Callable[[Unit, np.random.Generator], Unit] | None = None
    _proved: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.max_grad_norm = self.plan.terms.max_grad_norm
        self._parameters = {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def prove(self) -> None:
        """The start-up proof, on made-up units: it counts for the next ``run``.

        Raises:
            InputError: the model has parameters whose per-record gradients are wrong or unknown.
        """
        with self._clipping() as clipper:
            prove_per_record_gradients(clipper, self.unit_losses, self.synthetic)
        self._proved = True

    def run(self, streams: Streams, units: Sequence[Sequence[Unit]]) -> None:
        """The steps of this charge. Proves first where nobody did.

        Args:
            streams: the charge's random streams.
            units: the private units, each as the examples that it has: a step takes one of them, so that a unit adds
                one clipped gradient whatever it has.

        Raises:
            InputError: as ``prove``.
        """
        if not self._proved:
            self.prove()
        self._proved = False  # the weights move on
        with self._clipping() as clipper:
            together = self._together(clipper)
            for step in range(self.plan.terms.steps_per_round):
                with _seeded(streams, step):
                    self._step(clipper, together, streams, units, step)

    def clipped_sum(self, streams: Streams, units: Sequence[Sequence[Unit]]) -> dict[str, torch.Tensor]:
        """The sum of one step's clipped gradients by parameter, WITHOUT noise: private until there is noise on it.

        Its batch is that of ``run``'s first step. The model stays as it is.

        Args:
            streams: as of ``run``.
            units: as of ``run``.

        Raises:
            InputError: as ``prove``.
        """
        if not self._proved:
            self.prove()
        with self._clipping() as clipper, _seeded(streams, 0):
            self._accumulate(clipper, self._together(clipper), streams, units, 0)
            return clipper.take()

    def _together(self, clipper: Clipper) -> Together[Unit]:
        return Together(clipper, self.unit_losses, self.shape_of, self.made_up, self.micro_batch_size)

    @contextmanager
    def _clipping(self) -> Iterator[Clipper]:
        self.model.train()
        automatic = self.plan.terms.clipping_function == "automatic"
        with clipping(self.model, self.max_grad_norm, self.method, automatic=automatic) as clipper:
            yield clipper

    def _step(
        self, clipper: Clipper, together: Together[Unit], streams: Streams, units: Sequence[Sequence[Unit]], step: int
    ) -> None:
        plan = self.plan
        norms = self._accumulate(clipper, together, streams, units, step)
        # 3. Noise once on the sum, then the public normaliser.
        noise_std = plan.noise_std * self.max_grad_norm / plan.terms.max_grad_norm
        for name, clipped_sum in clipper.take().items():
            release = noised(clipped_sum, noise_std, streams, step, name)
            parameter = self._parameters[name]
            parameter.grad = (release / plan.expected_batch_size).to(parameter.dtype)
        if plan.terms.clipping_function == "quantile":
            self.max_grad_norm = clipper.max_grad_norm = self._next_norm(norms, streams, step)
        # 4. From here on only noised values are seen.
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _accumulate(
        self, clipper: Clipper, together: Together[Unit], streams: Streams, units: Sequence[Sequence[Unit]], step: int
    ) -> list[torch.Tensor]:
        # 1. Every unit is in the batch with probability q, by one of its examples; the batch may be empty.
        batch = one_example_each(streams, step, units, sample(self.plan, streams, step, len(units)), self.augment)
        # 2. Forward, backward and clipping, of units together where none changes another one's bits.
        return [clipper.accumulate(self.unit_losses, units) for units in together.cut(batch)]

    def _next_norm(self, norms: list[torch.Tensor], streams: Streams, step: int) -> float:
        """The clipping norm after this step, by a noised count of the gradients that were not shortened."""
        below = sum(float((norms_B <= self.max_grad_norm).double().sub(0.5).sum()) for norms_B in norms)
        # A parameter's name is never empty: this stream is no parameter's.
        count = noised(torch.tensor([below]), self.plan.count_noise_std, streams, step, "").item()
        share = 0.5 + count / self.plan.expected_batch_size
        farther = -_NORM_RATE * (share - self.plan.terms.target_quantile)
        # With a tiny expected batch the noised share may be of any size, and exp would overflow; what min cuts off here
        # is beyond the bounds below, too.
        moved = self.max_grad_norm * math.exp(min(farther, 2 * math.log(_FARTHEST_NORM)))
        start = self.plan.terms.max_grad_norm
        lowest, highest = max(start / _FARTHEST_NORM, SMALLEST_NORM), min(start * _FARTHEST_NORM, LARGEST_NORM)
        return min(max(moved, lowest), highest)


@contextmanager
def _seeded(streams: Streams, step: int) -> Iterator[None]:
    """Seeds torch: a repeated request sees the same chance in its forward passes, so its noise covers the same sum."""
    with torch.random.fork_rng():
        torch.manual_seed(int(streams.generator("torch", step).integers(2**63)))
        yield
