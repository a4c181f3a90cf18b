"""What one record adds is no longer than C, in exact arithmetic, wherever in float32's range its factors are."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from configs.errors import InputError
from privacy.clipping import clipping as module
from privacy.clipping.clipping import Clipper, clipping

LARGEST = float(torch.finfo(torch.float32).max)
any_float = st.floats(width=32, allow_nan=False, allow_infinity=False)
# Most draws of any_float are of ordinary size: what is tiny or huge is asked for.
extreme = st.builds(
    lambda mantissa, exponent: max(-LARGEST, min(LARGEST, mantissa * 2.0**exponent)),
    st.floats(-2, 2, width=32),
    st.integers(-149, 127),
)
factors = st.lists(st.one_of(any_float, extreme), min_size=2, max_size=5)
norms = st.floats(1e-6, 1e6)


def added(output_gradients, inputs, norm, **options):
    """What one record with these factors adds: one position, or as many as there are pairs."""
    layer = nn.Linear(len(inputs), len(output_gradients), bias=False)
    nn.init.zeros_(layer.weight)  # what flows through the layer never overflows: the factors are all there is
    left, right = torch.tensor(output_gradients), torch.tensor(inputs)
    with clipping(layer, norm, **options) as clipper:
        clipper.accumulate(lambda _: (layer(right[None]) * left).sum(dim=1), [0])
        return clipper.take()["weight"]


def exact_square(values):
    return sum(Fraction(value) ** 2 for value in values.flatten().tolist())


@given(factors, factors, norms, st.booleans())
@settings(max_examples=300, deadline=None)
def test_one_record_adds_at_most_c(output_gradients, inputs, norm, automatic):
    found = added(output_gradients, inputs, norm, automatic=automatic)
    assert found.isfinite().all()
    assert exact_square(found) <= Fraction(norm) ** 2


@given(factors, factors, norms)
@settings(max_examples=300, deadline=None)
def test_what_is_added_is_the_gradient_itself_or_as_long_as_c(output_gradients, inputs, norm):
    """Against the product in float64, where it is not so long that float32 can't square it."""
    gradient = torch.tensor(output_gradients).double()[:, None] * torch.tensor(inputs).double()[None, :]
    size = gradient.norm().item()
    found = added(output_gradients, inputs, norm)
    if gradient.abs().max() > LARGEST or size > 2.0**62:
        assert exact_square(found) <= Fraction(norm) ** 2
        return
    expected = gradient * min(1.0, norm / size) if size else gradient
    assert (found - expected).norm().item() <= 1e-5 * norm


def test_factors_whose_squares_vanish_are_clipped_all_the_same():
    """Float32 squares of 2e-23 are zero: with a norm of 7.8e-12 such a record was not clipped, and moved 536 C."""
    found = added([2e-23] * 8, [1e19] * 8, 1e-6)
    assert found.norm().item() == pytest.approx(1e-6, rel=1e-5)
    assert exact_square(found) <= Fraction(1e-6) ** 2


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), 0.0, -1.0, 7e-44, 6e36])
def test_norms_that_float32_has_no_room_around_are_refused(norm):
    """A denormal C let one record add 1.9 C; ``automatic`` with C near 6e36 made factors of infinity."""
    with pytest.raises(InputError, match="max_grad_norm is"), clipping(nn.Linear(2, 2), norm):
        pass


@pytest.mark.parametrize("factor", [2.0, 1e30, math.inf, math.nan])
def test_the_last_line_of_defence_lets_nothing_longer_through(factor, monkeypatch):
    right = Clipper._factors
    monkeypatch.setattr(Clipper, "_factors", lambda self, norms: right(self, norms) * torch.tensor([1.0, factor]))
    layer, inputs = nn.Linear(3, 2, bias=False), torch.randn(2, 3, generator=torch.Generator().manual_seed(0)) * 100
    with clipping(layer, 0.5) as clipper:
        clipper.accumulate(lambda chosen: layer(inputs[list(chosen)]).square().sum(dim=1), [0, 1])
        both = clipper.take()["weight"]
        monkeypatch.undo()
        clipper.accumulate(lambda chosen: layer(inputs[list(chosen)]).square().sum(dim=1), [0])
        assert torch.equal(both, clipper.take()["weight"])


def test_more_units_at_once_than_32_bits_hold_are_an_error():
    with clipping(nn.Linear(2, 2), 1.0) as clipper, pytest.raises(ValueError, match="17 units at once"):
        clipper.accumulate(lambda units: torch.zeros(len(units)), range(module.MOST_AT_ONCE + 1))
