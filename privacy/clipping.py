"""Per-record clipping over all trainable parameters together, on Opacus' per-record gradients (hooks)."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from configs.errors import InputError, SiloweaveError

_PROBE_TOLERANCE, _SMALL_SHARE = 1e-4, 1e-2


class Clipper:
    """Adds up clipped per-record gradients; micro-batches don't change the sum.

    Use through ``clipping(model, max_grad_norm)``, which takes the hooks off again.
    """

    def __init__(self, hooked: Any, model: Any, max_grad_norm: float) -> None:
        self._hooked = hooked
        self._parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self._max_grad_norm = max_grad_norm
        self._sums: dict[str, torch.Tensor] = {}
        self._reset()

    def _reset(self) -> None:
        self._sums = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in self._parameters.items()}

    def accumulate(self, record_losses_B: torch.Tensor) -> None:
        """One backward: clips each record's gradient to the norm C and adds it. A non-finite record adds zero."""
        gradients = self._per_record_gradients(record_losses_B)
        squares_PB = torch.stack([gradient.flatten(1).square().sum(dim=1) for gradient in gradients.values()])
        norms_B = squares_PB.sum(dim=0).sqrt()
        finite_B = norms_B.isfinite()
        factors_B = torch.where(finite_B, (self._max_grad_norm / (norms_B + 1e-6)).clamp(max=1.0), 0.0)
        for name, gradient in gradients.items():
            # 0 * inf is not 0: what is not finite is taken out before the product.
            safe = gradient if finite_B.all() else gradient.nan_to_num(0.0, 0.0, 0.0)
            self._sums[name] += torch.einsum("b,b...->...", factors_B, safe)

    def take(self) -> dict[str, torch.Tensor]:
        """The sums since the last call, by parameter name; zero where no record was added."""
        sums = self._sums
        self._reset()
        return sums

    def probe(self, unit_losses: Callable[[Sequence[Any]], torch.Tensor], synthetic: Sequence[Any]) -> None:
        """Proves on synthetic units that each per-record gradient is the gradient of that record alone.

        This catches tied weights, broadcast inputs and operations that mix records.

        Args:
            unit_losses: losses of a batch of units, shape (B,).
            synthetic: at least two made-up units.

        Raises:
            InputError: it is not so for some parameter, or its per-record gradient is not known.
        """
        parameters = list(self._parameters.values())
        self._hooked.disable_hooks()
        alone = [torch.autograd.grad(unit_losses([unit]).sum(), parameters) for unit in synthetic]
        self._hooked.enable_hooks()
        together = self._per_record_gradients(unit_losses(synthetic))
        whole = torch.stack([gradient.norm() for gradients in alone for gradient in gradients]).norm()
        for position, (name, gradient_B) in enumerate(together.items()):
            expected_B = torch.stack([gradients[position] for gradients in alone])
            fits = gradient_B.shape == expected_B.shape
            # Beside the whole gradient, which is what is clipped: one that cancels to nothing is all rounding.
            scale = torch.maximum(expected_B.norm(), _SMALL_SHARE * whole)
            error = (gradient_B - expected_B).norm() / scale if fits else torch.inf
            if not error <= _PROBE_TOLERANCE:
                raise InputError(
                    f"parameter {name}: its per-record gradients are not those of single records (relative error "
                    f"{error:.2g}); this model can't be trained under record-level privacy: freeze it or untie it"
                )

    def _per_record_gradients(self, record_losses_B: torch.Tensor) -> dict[str, torch.Tensor]:
        record_losses_B.sum().backward()
        gradients = {}
        for name, parameter in self._parameters.items():
            gradient = getattr(parameter, "grad_sample", None)
            if not isinstance(gradient, torch.Tensor):
                raise SiloweaveError(f"parameter {name}: its per-record gradient is not known; freeze it")
            gradients[name] = gradient.float()
            parameter.grad_sample = None
            parameter.grad = None
        return gradients


@contextmanager
def clipping(model: Any, max_grad_norm: float) -> Iterator[Clipper]:
    """Hooks a model for per-record gradients for as long as the context lasts."""
    from opacus import GradSampleModule

    hooked = GradSampleModule(model, loss_reduction="sum", strict=False)
    try:
        with warnings.catch_warnings():
            # Below the first adapter nothing needs a gradient; that its hook fires on outputs alone is what we want.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield Clipper(hooked, model, max_grad_norm)
    finally:
        hooked.remove_hooks()
        for parameter in model.parameters():
            if hasattr(parameter, "grad_sample"):
                del parameter.grad_sample
