"""Gradient canaries, and what an adversary of DP-SGD sees of them: each step's noised gradient, never the sum below it.

A gradient canary is a record whose gradient is one coordinate of a layer that nothing else touches (the Dirac canaries
of Nasr et al. 2023). It goes through the engine like every record: sampled, clipped with all parameters together,
noised.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from privacy.mechanism.dp_sgd import PrivateTraining
from privacy.mechanism.streams import Streams
from privacy.plan import PrivacyPlan

NO_CANARY = -1
_SUSPECTED_NOISE_SHARE = 1 / 4
_CLIPPED_FROM = 10.0


class CanaryLayer(nn.Module):
    """One weight per canary; a canary's loss has a gradient of ten times the clipping norm on its weight.

    So clipping has to bring it down to the norm; without clipping it shows ten times as much.
    """

    def __init__(self, canaries: int, max_grad_norm: float) -> None:
        super().__init__()
        self.layer = nn.Linear(canaries, 1, bias=False)
        nn.init.zeros_(self.layer.weight)
        self._canaries, self._norm = canaries, _CLIPPED_FROM * max_grad_norm

    def forward(self, canaries_B: torch.Tensor) -> torch.Tensor:
        """Losses, shape (B,), of canaries by their number; zero for ``NO_CANARY``."""
        is_canary_B = canaries_B != NO_CANARY
        inputs_BM = functional.one_hot(canaries_B.clamp(min=0), self._canaries) * is_canary_B[:, None]
        losses_B: torch.Tensor = self._norm * self.layer(inputs_BM.to(self.layer.weight.dtype)).squeeze(1)
        return losses_B


class Released:
    """Keeps what leaves each step: the noised gradients handed to the optimizer, and the weights they were taken at."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self._parameters = parameters
        optimizer.register_step_pre_hook(self._keep)

    def _keep(self, *_: Any) -> None:
        self.weights.append({name: value.detach().clone() for name, value in self._parameters.items()})
        self.gradients.append(
            {name: value.grad.detach().clone() for name, value in self._parameters.items() if value.grad is not None}
        )


def gradient_scores(
    plan: PrivacyPlan, gradients: Iterable[dict[str, torch.Tensor]], name: str
) -> npt.NDArray[np.float64]:
    """How much each gradient canary looks like one that batches held, from the layer's released gradients.

    The log-likelihood ratio of "in by Poisson sampling" against "out", summed over steps. It supposes a quarter of the
    plan's noise: an auditor's score should be at its best where the mechanism is broken.

    Args:
        plan: the plan of the run.
        gradients: of every step, by parameter name.
        name: the name of the canary layer's weight.

    Returns:
        (M,)
    """
    # In units of the clipping norm: a canary in the batch adds 1 to its coordinate of the released sum.
    scale = plan.expected_batch_size / plan.terms.max_grad_norm
    seen_TM = np.stack([step[name].flatten().double().numpy() for step in gradients]) * scale
    suspected = plan.terms.noise_multiplier * _SUSPECTED_NOISE_SHARE
    rate = plan.terms.sampling_rate
    ratios_TM = np.logaddexp(np.log1p(-rate), np.log(rate) + (seen_TM - 0.5) / suspected**2)
    return np.asarray(ratios_TM.sum(axis=0), dtype=np.float64)


def probe_alone(plan: PrivacyPlan, streams: Streams, coins: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Runs the steps of one charge on gradient canaries alone: the engine's own audit, in about a second.

    Args:
        plan: the plan that is audited.
        streams: of the charge.
        coins: (M,), which canaries are in.

    Returns:
        Scores, (M,).
    """
    probe = CanaryLayer(len(coins), plan.terms.max_grad_norm)
    optimizer = torch.optim.SGD(probe.parameters(), lr=1e-3)
    released = Released(optimizer, dict(probe.named_parameters()))
    PrivateTraining(
        plan,
        probe,
        optimizer,
        unit_losses=lambda batch: probe(torch.tensor(batch)),
        shape_of=lambda _: None,
        made_up=lambda _, number: range(number),
        synthetic=[0, 1, 2],
    ).run(streams, [(canary,) for canary in np.flatnonzero(coins).tolist()])
    return gradient_scores(plan, released.gradients, "layer.weight")
