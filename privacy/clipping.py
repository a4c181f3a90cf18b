"""Per-record clipping over all trainable parameters together: book-keeping, or one of Opacus' modes.

All methods give the same sum; they differ in speed, in memory, and in the layers that they know.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

from configs.errors import InputError
from configs.schema import ClippingMethod
from privacy.bookkeeping import BookKeeper
from privacy.opacus_modes import ExpandedWeights, Ghost, Hooks

Unit = TypeVar("Unit")
Losses = Callable[[Sequence[Unit]], torch.Tensor]

_PROBE_TOLERANCE, _PROBE_TOLERANCE_BF16, _SMALL_SHARE = 1e-4, 3e-2, 1e-2
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
        self._per_record, self._model, self._automatic = source.per_record, model, automatic
        self._parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.max_grad_norm = max_grad_norm
        self._sums: dict[str, torch.Tensor] = {}

    def _zeros(self) -> dict[str, torch.Tensor]:
        return {name: torch.zeros_like(value, dtype=torch.float32) for name, value in self._parameters.items()}

    def accumulate(self, unit_losses: Losses[Unit], units: Sequence[Unit]) -> torch.Tensor:
        """One forward and backward: clips each unit's gradient to the norm C and adds it.

        A unit whose gradient is not finite adds zero.

        Args:
            unit_losses: losses of a batch of units, shape (B,).
            units: at least one.

        Returns:
            The norms of the finite gradients, float32. Private: for what is noised next, not to be shown.
        """
        gradients = self._per_record(lambda: unit_losses(units), len(units))
        norms_B = gradients.squared_norms().sqrt()
        finite_B = norms_B.isfinite()
        if finite_B.all():
            self._sums = self._sums or self._zeros()
            gradients.add_to(self._sums, self._factors(norms_B))
            return norms_B
        # Anew without them: what is not finite can't be multiplied away.
        kept = [unit for unit, finite in zip(units, finite_B.tolist(), strict=True) if finite]
        return self.accumulate(unit_losses, kept) if kept else norms_B[:0]

    def _factors(self, norms_B: torch.Tensor) -> torch.Tensor:
        if self._automatic:  # normalised, never above C (Bu et al. 2022)
            return self.max_grad_norm / (norms_B + _STABILITY)
        return (self.max_grad_norm / (norms_B + 1e-6)).clamp(max=1.0)

    def take(self) -> dict[str, torch.Tensor]:
        """The sums since the last call, by parameter name; zero where no record was added."""
        sums, self._sums = self._sums or self._zeros(), {}
        return sums

    def probe(self, unit_losses: Losses[Unit], synthetic: Sequence[Unit]) -> None:
        """Proves on synthetic units that each per-record gradient, and its norm, are those of that record alone.

        This catches weights tied behind a layer's back, broadcast inputs and operations that mix records. Dropout is
        off meanwhile.

        Args:
            unit_losses: losses of a batch of units, shape (B,).
            synthetic: at least two made-up units.

        Raises:
            InputError: it is not so for some parameter, or its per-record gradient is not known.
        """
        with _without_dropout(self._model):
            alone = [self._alone(unit_losses, unit) for unit in synthetic]
            try:
                together = self._per_record(lambda: unit_losses(synthetic), len(synthetic))
                squares_B = together.squared_norms()
            except (RuntimeError, NotImplementedError) as error:  # what Opacus and torch raise for what they don't know
                reason = str(error).splitlines()[0]
                raise InputError(f"clipping: this method can't take this model ({reason}); set another one") from error
        found: list[dict[str, torch.Tensor]] = []
        for record in range(len(synthetic)):
            found.append(self._zeros())
            only = torch.zeros_like(squares_B)
            only[record] = 1.0
            together.add_to(found[-1], only)
        whole = torch.stack([gradient.norm() for gradients in alone for gradient in gradients.values()]).norm()
        if not whole > 0 and not squares_B.any():
            raise InputError("clipping: the made-up units give no gradient, so nothing is proved; give others")
        for name in self._parameters:
            expected, given = (torch.stack([record[name] for record in records]) for records in (alone, found))
            # Beside the whole gradient, which is what is clipped: one that cancels to nothing is all rounding.
            scale = torch.maximum(expected.norm(), _SMALL_SHARE * whole)
            self._check_probe(f"parameter {name}", (given - expected).norm() / scale)
        norms_B = torch.stack([torch.stack([g.norm() for g in gradients.values()]).norm() for gradients in alone])
        self._check_probe("the norms over all parameters", (squares_B.sqrt() - norms_B).norm() / norms_B.norm())

    def _check_probe(self, what: str, error: torch.Tensor) -> None:
        exact = all(parameter.dtype == torch.float32 for parameter in self._parameters.values())
        if not error <= (_PROBE_TOLERANCE if exact else _PROBE_TOLERANCE_BF16):
            raise InputError(
                f"{what}: per-record gradients are not those of single records (relative error {error:.2g}); this "
                "model can't be trained under record-level privacy: freeze or untie what the message names"
            )

    def _alone(self, unit_losses: Losses[Unit], unit: Unit) -> dict[str, torch.Tensor]:
        parameters = list(self._parameters.values())
        gradients = torch.autograd.grad(
            unit_losses([unit]).sum(), parameters, allow_unused=True, materialize_grads=True
        )
        return {name: gradient.float() for name, gradient in zip(self._parameters, gradients, strict=True)}


_SOURCES: dict[ClippingMethod, Callable[[Any], GradientSource]] = {
    "bookkeeping": BookKeeper,
    "opacus_hooks": Hooks,
    "opacus_ew": ExpandedWeights,
    "opacus_ghost": Ghost,
}


@contextmanager
def _without_dropout(model: Any) -> Iterator[None]:
    """Evaluation mode, but for layers with trainable parameters: Opacus' hooks look at those only in training."""
    before = {module: module.training for module in model.modules()}
    for module in before:
        module.training = any(value.requires_grad for value in module.parameters(recurse=False))
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


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
    if torch.get_float32_matmul_precision() != "highest":
        raise InputError(
            f"torch.set_float32_matmul_precision is {torch.get_float32_matmul_precision()!r}: norms must not be "
            "underestimated; leave it at 'highest' where gradients are clipped"
        )
    source = _SOURCES[method](model)
    try:
        with warnings.catch_warnings():
            # Below the first adapter nothing needs a gradient; that a hook fires on outputs alone is what we want.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield Clipper(source, model, max_grad_norm, automatic=automatic)
    finally:
        source.close()
