"""The accountant against dp-accounting's own, closed forms, exact integrals, and figures measured elsewhere."""

import math
from functools import cache

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import brentq

from configs.errors import InputError
from privacy.accounting.accountant import calibrate, guarantee, schedule_epsilon
from privacy.accounting.schedule import Schedule
from privacy.accounting.truncation import Truncation
from privacy.certificate.headline import headline

SOME = settings(max_examples=10, deadline=None)


def pld_epsilon(q, sigma, steps, delta):
    """Of Poisson-subsampled Gaussians and nothing else."""
    return schedule_epsilon(Schedule(steps, q, sigma), delta)


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta"),
    [
        (0.03, 0.59, 36, 1e-5),
        (0.01, 1.0, 1000, 1e-5),
        (0.001, 0.6, 500, 1e-6),
        (0.1, 4.0, 10_000, 1e-6),
        (0.5, 1.0, 1, 1e-5),
        (0.2, 30.0, 100, 1e-8),
    ],
)
def test_epsilon_is_that_of_dp_accountings_event(q, sigma, steps, delta):
    schedule = Schedule(steps, q, sigma)
    expected = PLDAccountant().compose(schedule.event()).get_epsilon(delta)  # with bins of 1e-4
    assert pld_epsilon(q, sigma, steps, delta) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("q", "sigma", "steps"), [(0.03, 0.8, 36), (0.001, 4.0, 10_000), (0.1, 30.0, 1000), (0.01, 0.5, 20_001)]
)
def test_the_bins_cost_less_than_a_part_in_a_thousand(q, sigma, steps):
    schedule = Schedule(steps, q, sigma)
    finer = schedule_epsilon(schedule, 1e-6, width=schedule.width() / 4)
    assert finer * (1 - 1e-9) <= schedule_epsilon(schedule, 1e-6) <= finer * 1.001


# RDP, PRV (lower and upper), PLD, as measured apart from this code.
@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta", "rdp", "prv", "pld"),
    [(0.01, 1.0, 1000, 1e-5, 2.101, (1.818, 1.838), 1.828), (0.001, 0.6, 5000, 1e-6, 3.627, (2.738, 2.759), 2.748)],
)
def test_the_accountants_give_the_figures_measured_elsewhere(q, sigma, steps, delta, rdp, prv, pld):
    found = guarantee(Schedule(steps, q, sigma), delta)
    assert found.epsilon == pytest.approx(pld, abs=1e-3)
    assert found.epsilon_rdp == pytest.approx(rdp, abs=2e-3)
    assert prv[0] < found.epsilon_prv < prv[1] + 2e-3
    assert found.epsilon_optimistic <= found.epsilon < found.epsilon_rdp


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(36, 0.03, 0.8, releases=((20.0, 3),)),
        Schedule(10, 1.0, 2.02),
        Schedule(36, 0.03, 0.8, Truncation(2000, 90), ((34.6, 3),)),
        Schedule(1, 0.001, 30.0),
    ],
)
def test_a_guarantee_has_every_accountant_that_knows_the_event(schedule):
    found = guarantee(schedule, 1e-5)
    assert 0 <= found.epsilon_optimistic <= found.epsilon
    if schedule.truncation is None:
        assert found.epsilon < found.epsilon_rdp
        assert found.epsilon_prv == pytest.approx(found.epsilon, abs=0.03)
    else:
        assert (found.epsilon_rdp, found.epsilon_prv) == (None, None)


def gaussian_epsilon(mu, delta):
    """Balle and Wang 2018, theorem 8."""

    def excess(epsilon):
        upper, lower = stats.norm.cdf(mu / 2 - epsilon / mu), stats.norm.logcdf(-mu / 2 - epsilon / mu)
        return upper - math.exp(epsilon + lower) - delta

    return brentq(excess, 0, 1000, xtol=1e-12)


@pytest.mark.parametrize(("sigma", "count"), [(2.02, 10), (6.8, 10), (1.0, 1), (50.0, 3), (0.5, 20)])
def test_the_plain_gaussian_has_its_closed_form(sigma, count):
    exact = gaussian_epsilon(math.sqrt(count) / sigma, 1e-5)
    assert exact * (1 - 1e-6) <= schedule_epsilon(Schedule(count, 1.0, sigma), 1e-5) <= exact * 1.001
    # Releases beside the steps are the same thing, however they are split.
    split = Schedule(1, 1.0, sigma, releases=((sigma, count - 1), (1e9, 5)) if count > 1 else ())
    assert schedule_epsilon(split, 1e-5) == pytest.approx(exact, rel=1e-3)


Q, SIGMA = st.floats(0.005, 0.5), st.floats(0.8, 20.0)
STEPS = st.integers(1, 2000)


@SOME
@given(Q, SIGMA, STEPS, st.floats(1.02, 3.0))
def test_epsilon_falls_with_noise_and_grows_with_rate_and_steps(q, sigma, steps, factor):
    # A part in a thousand is what bins may cost: only a factor above it has to show.
    before = pld_epsilon(q, sigma, steps, 1e-6)
    assert pld_epsilon(q, sigma * factor, steps, 1e-6) <= before * 1.001
    assert pld_epsilon(min(q * factor, 0.999), sigma, steps, 1e-6) >= before * 0.999
    assert pld_epsilon(q, sigma, math.ceil(steps * factor), 1e-6) >= before * 0.999
    assert pld_epsilon(q, sigma, steps, 1e-5) <= before
    assert schedule_epsilon(Schedule(steps, q, sigma), 1e-6, pessimistic=False) <= before


@SOME
@given(Q, STEPS, st.sampled_from([0.1, 0.5, 2.0, 8.0]))
def test_calibration_finds_the_smallest_noise_that_is_enough(q, steps, epsilon):
    sigma = calibrate(epsilon, 1e-5, Schedule(steps, q, 1.0))
    assert pld_epsilon(q, sigma, steps, 1e-5) <= epsilon
    assert sigma == 0.2 or pld_epsilon(q, sigma * 0.998, steps, 1e-5) > epsilon


def test_an_epsilon_out_of_reach_is_refused():
    with pytest.raises(InputError, match=r"privacy.epsilon is 1e-05.*raise privacy.epsilon"):
        calibrate(1e-5, 1e-9, Schedule(100_000, 0.5, 1.0))


@pytest.mark.parametrize("schedule", [Schedule(10**8, 0.1, 0.3), Schedule(10**10, 0.5, 1.0)])
def test_a_hopeless_schedule_is_infinite_at_once(schedule):
    assert schedule_epsilon(schedule, 1e-5) == math.inf


# Truncated Poisson


@pytest.mark.parametrize("cap", [66, 75, 90, 200])
@pytest.mark.parametrize("count", [60, 1500, 2000])
def test_truncation_is_never_below_dp_accountings_event_of_any_size(cap, count):
    schedule = Schedule(36, 0.03, 1.0, Truncation(2000, cap))
    event = dp_accounting.TruncatedSubsampledGaussianDpEvent(count, 0.03, cap, 1.0)
    oracle = PLDAccountant(value_discretization_interval=1e-3).compose(event, 36)
    expected = oracle.get_epsilon(schedule.accounted_delta(1e-5))
    found = schedule_epsilon(schedule, 1e-5, width=1e-3)
    assert found >= expected * (1 - 1e-9)
    if count == 2000 and cap >= 90:  # where few batches are full, the two are nearly one
        assert found == pytest.approx(expected, rel=1e-2)


def test_a_cap_that_is_never_reached_is_free_and_a_tighter_one_costs_more():
    poisson = schedule_epsilon(Schedule(36, 0.03, 1.0), 0.99e-5)
    by_cap = [schedule_epsilon(Schedule(36, 0.03, 1.0, Truncation(2000, cap)), 1e-5) for cap in (2000, 90, 75, 60)]
    assert by_cap[0] == poisson
    assert by_cap == sorted(by_cap)
    assert by_cap[-1] > 1.5 * poisson


@cache
def exact_densities(count, q, cap, sigma, grid):
    """Densities of one truncated step in one dimension, without and with a unit of +1 among ``count - 1`` of -1."""
    x = np.array(grid)
    drawn = np.arange(count)
    probability = stats.binom.pmf(drawn, count - 1, q)

    def bell(mean):
        return stats.norm.pdf(x, mean, sigma)

    without = sum(p * bell(-min(k, cap)) for k, p in zip(drawn, probability, strict=True))
    joined = np.zeros_like(x)
    for k, p in zip(drawn, probability, strict=True):
        kept = min(1.0, cap / (k + 1))  # the unit's own chance among k + 1
        others = min(k, cap - 1)
        joined += p * (kept * bell(1 - others) + (1 - kept) * bell(-cap))
    return without, (1 - q) * without + q * joined


@pytest.mark.parametrize(("cap", "max_units"), [(1, 6), (2, 12), (4, 20)])
@pytest.mark.parametrize("delta", [1e-5, 1e-3])
def test_truncation_covers_the_exact_mechanism_at_every_size(cap, max_units, delta):
    q, sigma = 0.15, 0.9
    schedule = Schedule(1, q, sigma, Truncation(max_units, cap))
    epsilon = schedule_epsilon(schedule, delta)
    grid = tuple(np.linspace(-14, 10, 4001))
    for count in range(1, max_units + 1):
        without, present = exact_densities(count, q, cap, sigma, grid)
        for one, other in ((without, present), (present, without)):
            exact = np.trapezoid(np.maximum(one - math.exp(epsilon) * other, 0), np.array(grid))
            assert exact <= delta


# A federation's claim

EPSILONS, DELTAS = {"a": 2.0, "b": 3.0}, {"a": 1e-6, "b": 2e-6}


def test_a_federation_claims_the_sum_unless_every_steward_attests():
    for attested in ({}, {"a": True}, {"a": True, "b": False}, {"a": True, "c": True}):
        claim = headline(EPSILONS, DELTAS, attested)
        assert (claim.epsilon, claim.delta, claim.rule[:3]) == (5.0, pytest.approx(3e-6), "sum")
    claim = headline(EPSILONS, DELTAS, {"a": True, "b": True})
    assert (claim.epsilon, claim.delta, claim.rule[:7]) == (3.0, 2e-6, "maximum")


@pytest.mark.parametrize(
    ("epsilons", "deltas"),
    [
        ({}, {}),
        (EPSILONS, {"a": 1e-6}),
        ({"a": 2.0}, DELTAS),
        ({**EPSILONS, "b": math.inf}, DELTAS),
        ({**EPSILONS, "b": math.nan}, DELTAS),
        (EPSILONS, {**DELTAS, "b": 1.0}),
        ({**EPSILONS, "b": -1.0}, DELTAS),
    ],
)
def test_no_claim_without_every_silos_guarantee(epsilons, deltas):
    with pytest.raises(InputError, match="give"):
        headline(epsilons, deltas, {"a": True, "b": True})


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(4, 1.24e-6, 0.8),
        Schedule(1, 4.9e-6, 2.0),
        Schedule(400, 1.2e-8, 1.0),
        Schedule(4, 1.2e-6, 0.8, Truncation(1000, 10)),
    ],
)
def test_a_unit_that_is_hardly_ever_in_a_batch_loses_nothing(schedule):
    """As the distribution of its privacy loss says, which takes the longer, the rarer the unit is in a batch."""
    assert schedule.rarely_in(1e-5)
    composed = schedule.pld(pessimistic=True, width=1e-3)
    assert composed.get_epsilon_for_delta(schedule.accounted_delta(1e-5)) == 0 == schedule_epsilon(schedule, 1e-5)
    assert schedule_epsilon(schedule, 1e-5, pessimistic=False) == 0


def test_a_unit_that_may_be_in_a_batch_or_in_a_metric_is_accounted_for():
    assert not Schedule(4, 1.26e-6, 0.8).rarely_in(1e-5)
    assert not Schedule(4, 1.26e-6, 0.8, Truncation(1000, 10)).rarely_in(1e-5)
    assert not Schedule(4, 1e-7, 0.8, None, ((1.0, 2),)).rarely_in(1e-5)
    assert schedule_epsilon(Schedule(4, 1e-5, 0.8), 1e-5, width=1e-3) > 0
