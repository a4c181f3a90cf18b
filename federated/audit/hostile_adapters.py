"""Adapters that a hostile coordinator would send, and how far one record then moves the sum of clipped gradients.

Under each one floating-point arithmetic may give a record another gradient beside others than alone, or a norm that is
not its gradient's. Whatever the adapter is, a record must not add a vector longer than C, nor move anything else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from privacy.clipping.clipping import clipping
from privacy.clipping.independence import Together
from trainer.models.adapters import trainable
from trainer.tasks.task import Encoded, TextTask

Weights = dict[str, torch.nn.Parameter]
Total = Callable[[Any, TextTask, Sequence[Encoded], float], torch.Tensor]
_NEIGHBOURS = 15


@dataclass(frozen=True)
class Movement:
    """What one record did to the sum, in units of the clipping norm C.

    Attributes:
        adapter: the name of the adapter.
        moved: length of the difference between the sum with the record and without it; it has to be at most 1.
        beside_its_own: length of what is left of that difference without what the record adds alone; it has to be 0.
    """

    adapter: str
    moved: float
    beside_its_own: float

    @property
    def holds(self) -> bool:
        """Whether the record moved the sum by its own clipped gradient and by nothing else."""
        return self.moved <= 1 and self.beside_its_own == 0


def overflow(weights: Weights, scale: float = 6e18) -> None:
    """The last layer's A takes its input to where float32 squares overflow; B is zero, and so nothing else shows."""
    last = [value for name, value in weights.items() if "lora_A" in name][-1]
    _silence(weights)
    last.copy_(scale * _normal(last))


def rounding(weights: Weights, scale: float = 1e9) -> None:
    """The last block adds products that cancel but for their rounding, 1e9 times as large."""
    a_RN, b_MR = [value for name, value in weights.items() if "down_proj" in name][-2:]
    _silence(weights)
    third = len(a_RN) // 3
    first, second = _normal(a_RN[:third]), _normal(a_RN[:third], seed=1)
    a_RN[: 3 * third] = torch.cat([first, second, first + second])
    b_MT = scale * _normal(b_MR[:, :third])
    b_MR[:, : 3 * third] = torch.cat([b_MT, b_MT, -b_MT], dim=1)


def underflow(weights: Weights, scale: float = 3e18) -> None:
    """A layer's input is as large as its output's gradient is small: their product counts, their squares vanish."""
    _silence(weights)
    for name, value in weights.items():
        if "v_proj" in name:
            value.copy_((scale if "lora_B" in name else 1.0) * _normal(value))
        elif "o_proj" in name and "lora_B" in name:
            value.copy_(1e-2 * _normal(value))


def ordinary(weights: Weights, scale: float = 1.0) -> None:
    """Weights such as an adapter has after some training."""
    for value in weights.values():
        value.copy_(scale * _normal(value))


# Each with the clipping norm under which it does most.
ADAPTERS: dict[str, tuple[Callable[[Weights], None], float]] = {
    "ordinary": (ordinary, 1.0),
    "overflow": (overflow, 1.0),
    "rounding": (rounding, 1.0),
    "underflow": (underflow, 1e-4),
}


def movements(model: Any, task: TextTask, total: Total | None = None) -> list[Movement]:
    """What a long made-up record adds to a sum of short ones, under each adapter; the weights are put back.

    Args:
        model: with an adapter; its layers are those of a Llama.
        task: what a record is to it.
        total: another engine's sum of clipped gradients, in units of C; None: ours.
    """
    total = total or clipped_total
    weights = trainable(model)
    before = {name: value.detach().clone() for name, value in weights.items()}
    found = []
    try:
        for name, (make, max_grad_norm) in ADAPTERS.items():
            with torch.no_grad():
                make(weights)
            short, long = neighbours(task)
            rest, whole, own = (total(model, task, batch, max_grad_norm) for batch in (short, [*short, long], [long]))
            found.append(Movement(name, (whole - rest).norm().item(), (whole - rest - own).norm().item()))
    finally:
        with torch.no_grad():
            for name, value in weights.items():
                value.copy_(before[name])
    return found


def neighbours(task: TextTask) -> tuple[list[Encoded], Encoded]:
    """Records of some five tokens, and one that fills the context."""
    rng = np.random.default_rng(0)
    lengths = [5 + number % 2 for number in range(_NEIGHBOURS)] + [task.context_length]
    rows = [tuple(rng.integers(1, task.vocab_size, size=length).tolist()) for length in lengths]
    *short, long = [Encoded(row, characters=len(row), truncated=False) for row in rows]
    return short, long


def clipped_total(model: Any, task: TextTask, batch: Sequence[Encoded], max_grad_norm: float) -> torch.Tensor:
    """The sum of clipped gradients, in units of C."""

    def losses(units: Sequence[Encoded]) -> torch.Tensor:
        return task.record_losses(model, task.collate(units))

    with clipping(model, max_grad_norm) as clipper:
        for units in Together(clipper, losses, task.shape, task.made_up, _NEIGHBOURS + 1).cut(batch):
            clipper.accumulate(losses, units)
        return torch.cat([total.flatten() for total in clipper.take().values()]) / max_grad_norm


def _silence(weights: Weights) -> None:
    for value in weights.values():
        value.zero_()


def _normal(like: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale: float = like.shape[1] ** -0.5
    return torch.randn(like.shape, generator=generator) * scale
