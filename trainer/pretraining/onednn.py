"""Linear layers computed by oneDNN where that is faster than torch's own float32 products.

torch multiplies them with MKL, which takes AVX-512 on Intel's processors only. oneDNN, which torch ships for other
precisions, takes it wherever it is: a whole step is 1.5 times as fast on some machines, and no faster on others of the
same maker (``benchmarks/pretrain.py``). So both are timed before one of them is chosen.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional

_ROWS, _COLUMNS = 512, 512  # of a product of 0.27 GFLOP: one takes 1 to 5 milliseconds on a core
_TURNS = 10
_LEAST_GAIN = 1.15  # less is within what timings differ by, and a run's processes should all choose alike


@dataclass(frozen=True)
class Products:
    """What float32 products are computed with.

    Attributes:
        onednn: whether oneDNN is taken.
        gain: how many times as fast as MKL it was; 0 where it is not there.
    """

    onednn: bool
    gain: float


TORCH = Products(onednn=False, gain=0.0)


@lru_cache(maxsize=1)
def fastest_products() -> Products:
    """Times both, in turns, for some tens of milliseconds; once per process."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return TORCH
    x, weight = torch.ones(_ROWS, _COLUMNS), torch.ones(_COLUMNS, _COLUMNS)
    ways = (lambda: functional.linear(x, weight), lambda: _times(x, weight))
    turns = [[_seconds(way) for way in ways] for _ in range(_TURNS)]
    mkl, onednn = (min(seconds) for seconds in zip(*turns, strict=True))  # what else runs here only makes it longer
    return Products(onednn=mkl >= _LEAST_GAIN * onednn, gain=mkl / onednn)


def _seconds(work: Callable[[], Any]) -> float:
    # The processor's own time, which other programs don't lengthen: a run that is resumed should choose alike.
    began = time.process_time()
    work()
    return time.process_time() - began


def use_onednn(model: torch.nn.Module) -> None:
    """From here on oneDNN computes the products of all linear layers, forward and backward."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = OneDnnLinear


class OneDnnLinear(torch.nn.Linear):
    """A linear layer, by oneDNN."""

    @staticmethod
    def multiply(left_MT: torch.Tensor, right_NT: torch.Tensor) -> torch.Tensor:
        """Gives left right^T, by oneDNN too."""
        return _times(left_MT, right_NT)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Gives x W^T + b."""
        output: torch.Tensor = _Linear.apply(inputs, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return output


class _Linear(torch.autograd.Function):
    """The weight is saved as it is, so that ZeRO-3 finds it gathered in the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight_OI)
        return _times(inputs, weight_OI, bias_O)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, weight_OI = ctx.saved_tensors
        of_inputs, of_weight, of_bias = ctx.needs_input_grad
        gradient_NO = gradient.flatten(0, -2)
        return (
            _times(gradient, weight_OI.t()) if of_inputs else None,
            _times(gradient_NO.t(), inputs.flatten(0, -2).t()) if of_weight else None,
            gradient_NO.sum(dim=0) if of_bias else None,
        )


def _times(left: torch.Tensor, right_JK: torch.Tensor, bias_J: torch.Tensor | None = None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(left, right_JK, bias_J, "none", [], "")
    return product
