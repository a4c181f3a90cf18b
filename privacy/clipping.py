"""Per-record clipping over all trainable parameters together: book-keeping, or one of Opacus' modes.

All methods give the same sum; they differ in speed, in memory, and in the layers that they know.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

from configs.errors import InputError
from configs.federated_settings import ClippingMethod
from privacy.allocator import keep_freed_memory
from privacy.bookkeeping import BookKeeper
from privacy.gradients import ROUNDING
from privacy.opacus_modes import ExpandedWeights, Ghost, Hooks

Unit = TypeVar("Unit")
Losses = Callable[[Sequence[Unit]], torch.Tensor]

_STABILITY = 0.01  # gamma of Bu et al. 2022


class BatchGradients(Protocol):
    """The per-record gradients of one micro-batch."""

    def squared_norms(self) -> torch.Tensor:
        """Each record's squared norm over all parameters, float32."""

    def add_to(self, sums: dict[str, torch.Tensor], factors_B: torch.Tensor) -> None:
        """Adds the records' gradients, each times its factor."""


class GradientSource(Protocol):
    """Gives per-record gradients of a model."""

    def per_record(self, losses: Callable[[], torch.Tensor], num_records: int, /) -> BatchGradients:
        """One forward and backward of B losses."""

    def close(self) -> None:
        """Leaves nothing on the model."""


class Clipper:
    """Adds up clipped per-record gradients; micro-batches don't change the sum.

    Use through ``clipping(model, max_grad_norm)``, which leaves the model as it was.
    """

    def __init__(
        self,
        source: GradientSource,
        model: Any,
        max_grad_norm: float,
        *,
        automatic: bool,
    ) -> None:
        self.source, self.model, self._automatic = source, model, automatic
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.max_grad_norm = max_grad_norm
        self._sums: dict[str, torch.Tensor] = {}

    def zeros(self) -> dict[str, torch.Tensor]:
        """An empty sum."""
        return {name: torch.zeros_like(value, dtype=torch.float32) for name, value in self.parameters.items()}

    def accumulate(self, unit_losses: Losses[Unit], units: Sequence[Unit]) -> torch.Tensor:
        """One forward and backward: clips each unit's gradient to the norm C and adds it.

        A unit whose gradient is not finite adds zero.

        Args:
            unit_losses: losses of a batch of units, shape (B,).
            units: at least one.

        Returns:
            The norms of the finite gradients, float32. Private: for what is noised next, not to be shown.
        """
        check_arithmetic()
        gradients = self.source.per_record(lambda: unit_losses(units), len(units))
        norms_B = gradients.squared_norms().sqrt()
        finite_B = norms_B.isfinite()
        if finite_B.all():
            self._sums = self._sums or self.zeros()
            gradients.add_to(self._sums, self._factors(norms_B))
            return norms_B
        # Anew without them: what is not finite can't be multiplied away.
        kept = [unit for unit, finite in zip(units, finite_B.tolist(), strict=True) if finite]
        return self.accumulate(unit_losses, kept) if kept else norms_B[:0]

    def _factors(self, norms_B: torch.Tensor) -> torch.Tensor:
        norm = self.max_grad_norm * (1 - ROUNDING)  # what float32 makes of factor times gradient stays below, too
        if self._automatic:  # normalised, never above C (Bu et al. 2022)
            return norm / (norms_B + _STABILITY)
        return (norm / (norms_B + 1e-6)).clamp(max=1.0)

    def take(self) -> dict[str, torch.Tensor]:
        """The sums since the last call, by parameter name; zero where no record was added."""
        sums, self._sums = self._sums or self.zeros(), {}
        return sums


_SOURCES: dict[ClippingMethod, Callable[[Any], GradientSource]] = {
    "bookkeeping": BookKeeper,
    "opacus_hooks": Hooks,
    "opacus_ew": ExpandedWeights,
    "opacus_ghost": Ghost,
}


@contextmanager
def clipping(
    model: Any,
    max_grad_norm: float,
    method: ClippingMethod = "bookkeeping",
    *,
    automatic: bool = False,
) -> Iterator[Clipper]:
    """Readies a model for per-record gradients for as long as the context lasts.

    Args:
        model: its trainable parameters are what is clipped.
        max_grad_norm: C, of one record's gradient over all trainable parameters together.
        method: speed only.
        automatic: scale every gradient to just below C, not only what is longer.

    Raises:
        InputError: the method doesn't know a layer with trainable parameters, or matrix products are rounded so
            coarsely that a norm can't be trusted.
    """
    check_arithmetic()
    keep_freed_memory()
    source = _SOURCES[method](model)
    try:
        with warnings.catch_warnings():
            # Below the first adapter nothing needs a gradient; that a hook fires on outputs alone is what we want.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield Clipper(source, model, max_grad_norm, automatic=automatic)
    finally:
        source.close()


def check_arithmetic() -> None:
    """Norms must not be underestimated: no coarse matrix products where they are computed.

    Raises:
        InputError: TF32 or bfloat16 products are switched on around the clipping.
    """
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # set for single backends
        precision = "mixed"
    if precision != "highest":
        raise InputError(
            f"torch.set_float32_matmul_precision is {precision!r}: leave it at 'highest' where gradients are clipped"
        )
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        raise InputError("torch.autocast is on around the clipping: use it inside unit_losses only")
