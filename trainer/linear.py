"""Linear layers for processors on which torch's float32 matrix products use half of the machine.

torch multiplies them with MKL, which takes AVX-512 on Intel's processors only. oneDNN, which torch ships for other
precisions, takes it on AMD's as well: a whole step is half as fast again there (``benchmarks/pretrain.py``).
"""

from pathlib import Path
from typing import Any

import torch

_CPU_INFO = Path("/proc/cpuinfo")


def mkl_holds_back() -> bool:
    """Whether MKL leaves this processor's AVX-512 unused, and oneDNN is here to use it."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not _CPU_INFO.exists():
        return False
    with_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return with_onednn and torch.backends.mkl.is_available() and "GenuineIntel" not in _CPU_INFO.read_text()


def use_onednn(model: torch.nn.Module) -> None:
    """From here on oneDNN computes the products of all linear layers without bias, forward and backward."""
    for module in model.modules():
        if type(module) is torch.nn.Linear and module.bias is None:
            module.__class__ = _OneDnnLinear


class _OneDnnLinear(torch.nn.Linear):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = _Product.apply(inputs, self.weight)  # type: ignore[no-untyped-call]
        return product


class _Product(torch.autograd.Function):
    """x W^T. The weight is saved as it is, so that ZeRO-3 finds it gathered in the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight_OI)
        return _times_transposed(inputs, weight_OI)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        inputs, weight_OI = ctx.saved_tensors
        of_inputs, of_weight = ctx.needs_input_grad
        gradient_NO, inputs_NI = gradient.flatten(0, -2), inputs.flatten(0, -2)
        return (
            _times_transposed(gradient, weight_OI.t()) if of_inputs else None,
            _times_transposed(gradient_NO.t(), inputs_NI.t()) if of_weight else None,
        )


def _times_transposed(left: torch.Tensor, right_JK: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(left, right_JK, None, "none", [], "")
    return product
