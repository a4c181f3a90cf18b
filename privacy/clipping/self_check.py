"""The start-up proof that per-record gradients are right, on made-up units and at weights near those that train.

It catches weights tied behind a layer's back, broadcast inputs, operations that mix records (batch statistics), and
whatever else makes a record's gradient depend on another record, or on chance.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from configs.errors import InputError, lines_of
from privacy.clipping.clipping import Clipper, Losses, Unit, check_arithmetic

_TOLERANCE, _TOLERANCE_BF16, _SMALL_SHARE = 1e-4, 3e-2, 1e-2
_PERTURBATION = 0.02

Gradients = dict[str, torch.Tensor]


def prove_per_record_gradients(clipper: Clipper, unit_losses: Losses[Unit], synthetic: Sequence[Unit]) -> None:
    """Proves that each per-record gradient, and its norm, are those of that record alone.

    The model is probed in the mode that it trains in. Weights are moved a little meanwhile: where they are zero (LoRA's
    B at the start) other parameters have no gradient, and nothing would be proved about them.

    Args:
        clipper: nothing is added to its sum.
        unit_losses: losses of a batch of units, shape (B,).
        synthetic: at least two made-up units.

    Raises:
        InputError: it is not so for some parameter; dropout is active; or a buffer changes in a forward pass.
    """
    check_arithmetic()
    trains, whole = _tolerance(clipper.parameters.values()), _tolerance(clipper.model.parameters())
    # Frozen weights in bfloat16 round otherwise in another shape: closely a unit is compared with itself alone.
    closely = trains < whole
    with _moved(clipper), _no_dropout(), _same_buffers(clipper.model):
        try:
            alone = [_alone(clipper, unit_losses, unit) for unit in synthetic]
            found, squares_B = _found(clipper, unit_losses, synthetic)
            singles = [_found(clipper, unit_losses, [unit]) for unit in synthetic if closely]
        except (
            RuntimeError,
            NotImplementedError,
            ValueError,
            IndexError,
        ) as error:  # of torch and Opacus
            reason = lines_of(error)[0]
            raise InputError(f"clipping: this method can't take this model ({reason}); set another one") from error
    _compare(clipper, alone, found, squares_B, whole)
    if closely:
        squares = torch.cat([squares for _, squares in singles])
        _compare(clipper, alone, [gradients for (gradients,), _ in singles], squares, trains)


def _tolerance(parameters: Iterable[torch.Tensor]) -> float:
    return _TOLERANCE if all(value.dtype == torch.float32 for value in parameters) else _TOLERANCE_BF16


def _found(clipper: Clipper, unit_losses: Losses[Unit], units: Sequence[Unit]) -> tuple[list[Gradients], torch.Tensor]:
    """What is proved: each unit's gradient, and its squared norm."""
    found = clipper.source.per_record(lambda: unit_losses(units), len(units))
    return [found.of(record, clipper.parameters) for record in range(len(units))], found.squared_norms()


def _alone(clipper: Clipper, unit_losses: Losses[Unit], unit: Unit) -> Gradients:
    """The oracle: an ordinary backward of one unit."""
    parameters = list(clipper.parameters.values())
    gradients = torch.autograd.grad(unit_losses([unit]).sum(), parameters, allow_unused=True, materialize_grads=True)
    return {name: gradient.float() for name, gradient in zip(clipper.parameters, gradients, strict=True)}


def _compare(
    clipper: Clipper, alone: list[Gradients], found: list[Gradients], squares_B: torch.Tensor, tolerance: float
) -> None:
    norms_B = torch.stack([torch.stack([g.norm() for g in gradients.values()]).norm() for gradients in alone])
    if not norms_B.any() and not squares_B.any():
        raise InputError("clipping: the made-up units give no gradient, so nothing is proved; give others")
    for name in clipper.parameters:
        expected, given = (torch.stack([record[name] for record in records]) for records in (alone, found))
        # Relative to the whole gradient, which is what is clipped: a parameter's gradient that cancels to nothing is
        # all rounding.
        scale = torch.maximum(expected.norm(), _SMALL_SHARE * norms_B.norm())
        _check(f"parameter {name}", (given - expected).norm() / scale, tolerance)
    _check("the norms over all parameters", (squares_B.sqrt() - norms_B).norm() / norms_B.norm(), tolerance)


def _check(what: str, error: torch.Tensor, tolerance: float) -> None:
    if not error <= tolerance:
        raise InputError(
            f"{what}: per-record gradients are not those of single records (relative error {error:.2g}); this model "
            "can't be trained under record-level privacy: freeze or untie what the message names"
        )


@contextmanager
def _moved(clipper: Clipper) -> Iterator[None]:
    """Moves the trainable weights a little, for as long as the context lasts."""
    before = {name: value.detach().clone() for name, value in clipper.parameters.items()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in clipper.parameters.values():
            size = value.float().square().mean().sqrt().clamp(min=1.0 if not value.any() else 1e-3)
            direction = torch.randn(value.shape, generator=generator, device="cpu").to(value.device)
            value.add_((_PERTURBATION * size * direction).to(value.dtype))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in clipper.parameters.items():
                value.copy_(before[name])


@contextmanager
def _same_buffers(model: Any) -> Iterator[None]:
    """Refuses a forward pass that changes a buffer: running statistics would be released without noise."""
    before = {name: value.clone() for name, value in model.named_buffers()}
    yield
    for name, value in model.named_buffers():
        if name not in before or not torch.equal(before[name], value):
            raise InputError(f"buffer {name}: a forward pass changes it; private values would stay in it, so freeze it")


class _no_dropout(TorchFunctionMode):  # noqa: N801  # used as a context manager
    """Refuses active dropout: its masks come from a generator of 32 bits, which is no secret to rely on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (functional.dropout, functional.dropout1d, functional.dropout2d, functional.alpha_dropout):
            rate = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
            active = rate > 0 and kwargs.get("training", args[2] if len(args) > 2 else True)
        else:
            active = func is functional.scaled_dot_product_attention and kwargs.get("dropout_p", 0.0) > 0
        if active:
            raise InputError("clipping: dropout is active; set all dropout rates to 0 (the noise regularises enough)")
        return func(*args, **kwargs)
