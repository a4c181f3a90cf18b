"""Per-record clipping over all trainable parameters together: book-keeping, or one of Opacus' modes.

What one record adds to the sum is bounded in exact arithmetic: its gradient times its factor is rounded to whole steps
of a public grid, whose squares are added exactly and compared with C; only then are they added, and a sum of whole
numbers depends on no order. That a record's gradient depends on no other one is proved in
``privacy.clipping.independence``.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, Protocol, TypeVar

import torch

from configs.errors import InputError
from configs.schema.federated import ClippingMethod
from privacy.clipping.bookkeeping import BookKeeper
from privacy.clipping.gradients import ByParameter
from privacy.clipping.malloc import keep_freed_memory
from privacy.clipping.opacus_modes import ExpandedWeights, Hooks

Unit = TypeVar("Unit")
Losses = Callable[[Sequence[Unit]], torch.Tensor]

SMALLEST_NORM, LARGEST_NORM = 1e-9, 1e9
_STABILITY = 0.01  # gamma of Bu et al. 2022
_ROUNDING = 2.0**-20  # more than float32 rounds a norm and a product up by
MOST_AT_ONCE = 16  # units; the sum of far more still fits 32 bits
_GRID_BITS = 23  # C is at most 2^24 steps of the grid: what float32 tells apart


class GradientSource(Protocol):
    """Gives per-record gradients of a model."""

    def per_record(self, losses: Callable[[], torch.Tensor], num_records: int, /) -> ByParameter:
        """Runs one forward and one backward pass of B losses."""

    def close(self) -> None:
        """Leaves nothing on the model."""


class Clipper:
    """Adds up clipped per-record gradients.

    Use through ``clipping(model, max_grad_norm)``, which leaves the model as it was.
    """

    def __init__(self, source: GradientSource, model: Any, max_grad_norm: float, *, automatic: bool) -> None:
        self.source, self.model, self._automatic = source, model, automatic
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        # Rounding to whole steps of the grid moves a gradient by this many steps at most.
        self._farthest = math.sqrt(sum(value.numel() for value in self.parameters.values())) / 2
        self.max_grad_norm = max_grad_norm
        self._sums: dict[str, torch.Tensor] = {}

    @property
    def max_grad_norm(self) -> float:
        """C, which bounds one record's gradient over all trainable parameters together."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, norm: float) -> None:
        if not SMALLEST_NORM <= norm <= LARGEST_NORM:  # false for a NaN, too
            raise InputError(
                f"max_grad_norm is {norm:g}: float32 gradients are clipped to norms from {SMALLEST_NORM:g} to "
                f"{LARGEST_NORM:g}; give one between them"
            )
        self._max_grad_norm = norm
        self._spacing = 2.0 ** (math.floor(math.log2(norm)) - _GRID_BITS)
        self._largest_square = math.floor(Fraction(norm / self._spacing) ** 2)  # in steps; the quotient is exact

    def accumulate(self, unit_losses: Losses[Unit], units: Sequence[Unit]) -> torch.Tensor:
        """One forward and backward: clips each unit's gradient to the norm C and adds it.

        A unit whose gradient is not finite adds zero.

        Args:
            unit_losses: losses of a batch of units, shape (B,).
            units: at most 16. They are computed together, so each must be independent of the others
                (``privacy.clipping.independence``).

        Returns:
            Norms of the finite gradients before clipping, float64.
        """
        check_arithmetic()
        if len(units) > MOST_AT_ONCE:
            raise ValueError(f"{len(units)} units at once: their sum may not fit 32 bits; give at most {MOST_AT_ONCE}")
        gradients = self.source.per_record(lambda: unit_losses(units), len(units))
        norms_B = gradients.squared_norms().sqrt()
        finite_B = norms_B.isfinite()
        if not finite_B.all():
            gradients = gradients.without(~finite_B)
        factors_B = torch.where(finite_B, self._factors(norms_B), 0.0)
        whole = gradients.whole(factors_B)
        # The last line of defence: whatever a norm or a factor was, what is added is no longer than C.
        allowed_B = self._squares(whole) <= self._largest_square
        if not allowed_B.all():
            whole = gradients.without(~allowed_B).whole(torch.where(allowed_B, factors_B, 0.0))
        for name, share in whole.items():
            share.add_to(self._sum(name))
        return norms_B[finite_B]

    def _factors(self, norms_B: torch.Tensor) -> torch.Tensor:
        """Factors that bring gradients to length C at most, in units of the grid; float32.

        Automatic clipping brings all of them to just below C (Bu et al. 2022).
        """
        norm = self.max_grad_norm * (1 - _ROUNDING) - self._spacing * self._farthest
        lengths_B = norms_B + _STABILITY if self._automatic else norms_B.clamp(min=norm)
        return (norm / lengths_B / self._spacing).float()

    @staticmethod
    def _squares(whole: dict[str, Any]) -> torch.Tensor:
        return torch.stack([share.squares for share in whole.values()]).sum(dim=0)

    def _sum(self, name: str) -> torch.Tensor:
        if name not in self._sums:
            self._sums[name] = torch.zeros_like(self.parameters[name], dtype=torch.float64)
        return self._sums[name]

    def take(self) -> dict[str, torch.Tensor]:
        """The sums since the last call, by parameter name, float64 and exact; zero where no record was added."""
        sums = {name: self._sum(name).mul_(self._spacing) for name in self.parameters}
        self._sums = {}
        return sums


_SOURCES: dict[ClippingMethod, Callable[[Any], GradientSource]] = {
    "bookkeeping": BookKeeper,
    "opacus_hooks": Hooks,
    "opacus_ew": ExpandedWeights,
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
        method: how per-record gradients are formed.
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
