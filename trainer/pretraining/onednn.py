"""Linear layers computed by oneDNN where MKL, which torch asks for float32 products, holds back.

MKL takes AVX-512 on Intel's processors only. oneDNN, which torch ships for other precisions, takes it wherever it is: a
whole step is 1.5 times as fast on some machines (``benchmarks/pretrain.py``). The two round differently. So the
processor's kind alone chooses, and no clock: two processes of a machine give the same bits, however busy it is.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

_PROCESSOR = Path("/proc/cpuinfo")  # Linux'; elsewhere torch's own products stay


@lru_cache(maxsize=1)
def mkl_holds_back() -> bool:
    """Whether this processor has AVX-512 that MKL leaves alone, and this torch has oneDNN's layers."""
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    has_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return has_onednn and has_avx512 and torch.backends.mkl.is_available() and _maker() not in {"", "GenuineIntel"}


def _maker() -> str:
    """As the processor itself names it; empty where that is not known."""
    try:
        lines = _PROCESSOR.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


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
