"""The discrete Gaussian's draws against its exact probabilities.

All streams are fixed. A correct sampler would fail one of these on another stream with a chance below 1e-9.
"""

import mpmath
import numpy as np
import pytest
from scipy import stats

from privacy.distributed.discrete_gaussian import LARGEST_BITS, discrete_gaussian
from privacy.mechanism.streams import Streams

STREAMS = Streams(bytes(range(32)), "33" * 32)
CHANCE = 1e-10


def draws(bits, size=200_000, step=0):
    return discrete_gaussian(bits, size, STREAMS.generator("share", step, f"{bits}"))


def exact_pmf(bits):
    """The probabilities of 0, 1, 2 and so on, and the variance, with 50 digits."""
    with mpmath.workdps(50):
        weights = [mpmath.exp(-mpmath.mpf(y * y) / (2 * 4**bits)) for y in range(30 << bits)]
        total = 2 * mpmath.fsum(weights) - 1
        variance = 2 * mpmath.fsum(y * y * weight for y, weight in enumerate(weights)) / total
        return np.array([float(weight / total) for weight in weights]), float(variance)


def p_value(values, bits):
    """Chi-square over all values whose expected number is 20 or more, the tails together."""
    pmf, _ = exact_pmf(bits)
    far = int(np.flatnonzero(pmf * len(values) >= 20)[-1])
    probabilities = np.concatenate([pmf[far:0:-1], pmf[: far + 1]])
    expected = np.append(probabilities, 1 - probabilities.sum()) * len(values)
    found = np.bincount(np.where(np.abs(values) <= far, values + far, 2 * far + 1), minlength=len(expected))
    if expected[-1] < 20:
        found, expected = np.append(found[:-2], found[-2:].sum()), np.append(expected[:-2], expected[-2:].sum())
    return float(stats.chisquare(found, expected).pvalue)


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 6])
def test_every_value_is_as_likely_as_it_has_to_be(bits):
    assert p_value(draws(bits), bits) > CHANCE


def test_a_rounded_gaussian_is_found_out():
    """The test above has the power to tell the usual mistake."""
    rounded = np.rint(np.random.default_rng(1).normal(size=200_000)).astype(np.int64)
    assert p_value(rounded, 0) < CHANCE


@pytest.mark.parametrize("bits", [0, 2, 5])
def test_mean_and_variance_are_the_exact_ones(bits):
    values, (_, variance) = draws(bits, step=1), exact_pmf(bits)
    error = np.sqrt(variance / len(values))
    assert abs(values.mean()) < 7 * error
    assert abs(np.square(values).mean() - variance) < 7 * np.sqrt(2) * error * np.sqrt(variance)


def test_wide_noise_has_the_bell_and_even_low_digits():
    values = draws(LARGEST_BITS, 500_000)
    edges = np.arange(-24, 25) / 8
    # At half-integers the discrete distribution's sums are the Gaussian's, to 13 digits.
    shares = np.diff(stats.norm.cdf(np.concatenate([[-np.inf], edges - 0.5 / 2**LARGEST_BITS, [np.inf]])))
    found = np.bincount(np.searchsorted(edges * 2.0**LARGEST_BITS, values, side="right"), minlength=len(shares))
    assert stats.chisquare(found, shares * len(values)).pvalue > CHANCE
    assert stats.chisquare(np.bincount(values & 1023)).pvalue > CHANCE


def test_draws_are_independent_of_one_another_and_of_other_streams():
    values = draws(3).astype(float)
    other = draws(3, step=1).astype(float)
    for left, right in ((values[1:], values[:-1]), (values, other), (np.abs(values[1:]), np.abs(values[:-1]))):
        assert abs(np.corrcoef(left, right)[0, 1]) < 7 / np.sqrt(len(left))


def test_a_stream_repeats_its_draws():
    assert np.array_equal(draws(9, 1000), draws(9, 1000))
    assert not np.array_equal(draws(9, 1000), draws(9, 1000, step=1))
    assert len(draws(9, 0)) == 0


@pytest.mark.parametrize("bits", [-1, LARGEST_BITS + 1])
def test_a_deviation_out_of_range_is_refused(bits):
    with pytest.raises(ValueError, match="bits"):
        draws(bits, 1)
