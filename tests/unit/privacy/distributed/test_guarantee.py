"""The charge of distributed sums against exact probabilities, dp-accounting, and the published Renyi bound."""

import math
from dataclasses import replace

import dp_accounting as dp
import mpmath
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.rdp import RdpAccountant

from configs.errors import InputError
from privacy.accounting.accountant import calibrate, schedule_epsilon
from privacy.accounting.schedule import Schedule
from privacy.distributed.distributed import DistributedNoise
from privacy.distributed.guarantee import calibrated, epsilon, gaussian_noise_multiplier, sensitivity

DELTA = 1e-6
RECORDS = DistributedNoise(1.2, 1.0, 128.0, silos=20, min_honest=15, colluders=3, dimension=100_000)
SILOS = replace(RECORDS, reach=1.0, noise_multiplier=4.0)
ONE_VALUE = DistributedNoise(1.0, 1.0, 30.0, silos=3, min_honest=2, colluders=0, dimension=1, word_bits=16)


def coarse(share_bits, **fields):
    """A sum of single values whose shares have so few steps: a long reach leaves no more room."""
    for power in range(40):
        noise = replace(ONE_VALUE, reach=30.0 * 1.5**power, **fields)
        if noise.share_bits == share_bits:
            return noise
    raise AssertionError(share_bits)


def shares(bits, count):
    """The exact law of a sum of shares, over -span to span."""
    span = 14 << bits
    one = np.exp(-(np.arange(-span, span + 1) ** 2) / (2.0 * 4**bits))
    total = one = one / one.sum()
    for _ in range(count - 1):
        total = np.convolve(total, one)
    return total


def law(noise, position):
    """The exact law of a decoded sum whose only vector lies at this position, in steps: dither, then shares."""
    low, up = math.floor(position), position - math.floor(position)
    exact = shares(noise.share_bits, noise.min_honest)
    room = np.zeros(len(exact) + 3 + math.ceil(noise.clip / noise.step))
    room[low : low + len(exact)] += (1 - up) * exact
    room[low + 1 : low + 1 + len(exact)] += up * exact
    return room


def lower_estimates(noise, start, steps, rate):
    """Epsilons that neighbours at these positions have at least, in both directions."""
    without = law(noise, start)
    with_one = (1 - rate) * without + rate * law(noise, start + noise.clip / noise.step)
    logs = [{y: math.log(p) for y, p in enumerate(some) if p > 0} for some in (without, with_one)]
    for lower, upper in (logs, logs[::-1]):
        exact = pld.from_two_probability_mass_functions(lower, upper, False, 1e-3 if steps == 1 else 1e-4)
        yield exact.self_compose(steps).get_epsilon_for_delta(DELTA)


@pytest.mark.parametrize("start", [0.0, 0.37])
@pytest.mark.parametrize(
    ("bits", "sigma", "steps", "rate"),
    [(2, 1.0, 1, 1.0), (2, 3.0, 20, 1.0), (5, 0.7, 1, 1.0), (7, 2.5, 10, 1.0), (7, 1.0, 100, 0.05), (6, 0.8, 30, 0.2)],
)
def test_the_charge_is_above_the_exact_loss_and_close_to_it(bits, sigma, steps, rate, start):
    """The whole mechanism: any place between two steps, dither, shares of two silos, sampling, composition."""
    noise = coarse(bits, noise_multiplier=sigma)
    charged = epsilon(noise, steps=steps, delta=DELTA, sampling_rate=rate)
    exact = max(lower_estimates(noise, start, steps, rate))
    # Of a single value, rounding may add a whole step to the clip, and is charged so.
    rounding = 1 + noise.step / noise.clip
    assert exact <= charged <= 1.05 * rounding**2 * exact
    assert bits < 7 or charged <= 1.03 * exact


def hockey_stick(upper, lower, at):
    return float(np.maximum(upper - math.exp(at) * lower, 0).sum())


@pytest.mark.parametrize("angle", [0.0, 0.3, math.pi / 4])
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_the_charge_holds_for_vectors_of_two_values_in_any_direction(angle, rate):
    """All probabilities of one sum, in a plane."""
    noise = replace(coarse(5), dimension=2)
    assert noise.share_bits == 5
    clip = noise.clip / noise.step
    without = np.outer(law(noise, 0.3), law(noise, 0.8))
    moved = np.outer(law(noise, 0.3 + clip * math.cos(angle)), law(noise, 0.8 + clip * math.sin(angle)))
    with_one = (1 - rate) * without + rate * moved
    charged = epsilon(noise, steps=1, delta=DELTA, sampling_rate=rate)
    assert max(hockey_stick(with_one, without, charged), hockey_stick(without, with_one, charged)) <= DELTA
    assert hockey_stick(with_one, without, 0.9 * charged) > DELTA


@pytest.mark.parametrize("count", [2, 5])
def test_shares_add_up_to_nearly_one_discrete_gaussian(count):
    """Shares with a deviation of 1 step, where the distance can be seen, and is bounded as in the proof."""
    found = shares(0, count)
    y = np.arange(len(found)) - len(found) // 2
    single = np.exp(-(y**2) / (2.0 * count))
    ratios = np.log(found / (single / single.sum()))[np.abs(y) <= 8]
    bound = 5 * sum(math.exp(-2 * math.pi**2 * k / (k + 1)) for k in range(1, count))
    assert 1e-12 < np.abs(ratios).max() <= bound  # far above what floating point does


@pytest.mark.parametrize(("rounding", "shift"), [(0.4, 0), (0.5, 3), (0.6, -2)])
def test_a_discrete_gaussian_is_nearly_a_gaussian_rounded_at_random(rounding, shift):
    """By integration over the Gaussian's values; its variance and that of the rounding add up to 4."""
    w, width = np.linspace(shift - 20, shift + 20, 200_001, retstep=True)
    density = np.exp(-((w - shift) ** 2) / (2 * (4 - rounding**2)))
    grid = np.arange(-30, 31)
    normaliser = sum(np.exp(-((y - w) ** 2) / (2 * rounding**2)) for y in grid)
    found = [(density * np.exp(-((y - w) ** 2) / (2 * rounding**2)) / normaliser).sum() * width for y in grid]
    found = np.array(found) / (density.sum() * width)
    wanted = np.exp(-((grid - shift) ** 2) / 8.0)
    ratios = np.log(found / (wanted / wanted.sum()))[np.abs(grid - shift) <= 8]
    bound = 5 * math.exp(-2 * math.pi**2 * rounding**2)
    assert 1e-12 < np.abs(ratios).max() <= bound


def test_what_the_proof_neglects_is_less_than_is_added():
    """5 exp(-8 pi^2) of discreteness and, with the smallest shares and most silos, that of all their sums."""
    with mpmath.workdps(60):
        factor = -2 * mpmath.pi**2
        of_sums = 5 * mpmath.fsum(mpmath.exp(factor * 16 * k / (k + 1)) for k in range(1, 2**15))
        discreteness = 5 * mpmath.exp(factor * 4)
        assert of_sums + discreteness < 6 * mpmath.exp(factor * 4)


@pytest.mark.parametrize("sigma", [1.0, 3.0])
def test_it_is_dp_accountings_discrete_gaussian_where_nothing_is_rounded(sigma):
    noise = coarse(6, noise_multiplier=sigma)
    deviation = math.sqrt(2) * 2**6
    moved = math.floor(sensitivity(noise, 1e-9))
    theirs = pld.from_discrete_gaussian_mechanism(deviation, moved).get_epsilon_for_delta(DELTA)
    ours = schedule_epsilon(Schedule(1, 1.0, math.sqrt(deviation**2 - 4) / moved), DELTA)
    assert theirs == pytest.approx(ours, rel=2e-3)


def test_with_fine_steps_it_is_the_gaussian_mechanism_itself():
    found = gaussian_noise_multiplier(RECORDS, steps=1000, delta=DELTA)
    assert 1 - 1e-4 < found / RECORDS.noise_multiplier < 1


@pytest.mark.parametrize(("noise", "rate", "steps"), [(RECORDS, 0.02, 200), (SILOS, 1.0, 20)])
def test_it_is_below_the_published_renyi_bound(noise, rate, steps):
    """Kairouz, Liu and Steinke's proposition 14 for the same sensitivity; at integer orders it holds for samples."""
    bits, count = noise.share_bits, noise.min_honest
    tau = 10 * sum(math.exp(-2 * math.pi**2 * 4.0**bits * k / (k + 1)) for k in range(1, count))
    moved = sensitivity(noise, 0.01 * DELTA / steps)
    deviation = moved / (math.sqrt(count) * 2**bits) + tau * math.sqrt(noise.dimension)
    step = dp.GaussianDpEvent(1 / deviation)
    event = dp.PoissonSampledDpEvent(rate, step) if rate < 1 else step
    theirs = RdpAccountant(list(range(2, 65))).compose(event, steps).get_epsilon(0.99 * DELTA)
    assert 0.8 * theirs < epsilon(noise, steps=steps, delta=DELTA, sampling_rate=rate) < theirs


def charge(noise=RECORDS, *, steps=50, delta=DELTA, rate=0.02, **fields):
    return epsilon(replace(noise, **fields), steps=steps, delta=delta, sampling_rate=rate)


def gaussian(noise, **fields):
    return gaussian_noise_multiplier(replace(noise, **fields), steps=50, delta=DELTA)


def test_more_noise_or_honest_silos_never_cost_more_and_more_of_anything_else_never_less():
    sixteen = replace(RECORDS, dimension=1000, word_bits=16, reach=8.0)
    for noise in (RECORDS, sixteen):
        by_sigma = [gaussian(noise, noise_multiplier=sigma) for sigma in np.geomspace(0.7, 30, 150)]
        assert by_sigma == sorted(by_sigma)
        # More survivors than are charged: their number is not even asked for. More silos take room.
        by_silos = [gaussian(noise, silos=silos) for silos in range(18, 90)]
        assert by_silos == sorted(by_silos, reverse=True)
        by_reach = [gaussian(noise, reach=reach) for reach in np.geomspace(2, 100, 30)]
        assert by_reach == sorted(by_reach, reverse=True)
        assert gaussian(noise, reach=2.0) < noise.noise_multiplier
    assert charge() < charge(steps=60) and charge() < charge(delta=1e-7) and charge() < charge(rate=0.03)
    assert charge() <= charge(dimension=10**7)
    assert charge(min_honest=12) == pytest.approx(charge(), rel=1e-3)


@pytest.mark.parametrize(("noise", "rate", "steps"), [(RECORDS, 0.02, 200), (SILOS, 1.0, 20)])
@pytest.mark.parametrize("spent", [1.0, 8.0])
def test_calibrated_noise_spends_what_it_may_and_no_noise_for_nothing(noise, rate, steps, spent):
    best = calibrated(noise, spent, steps=steps, delta=DELTA, sampling_rate=rate)
    assert 0.998 * spent <= epsilon(best, steps=steps, delta=DELTA, sampling_rate=rate) <= spent
    less = replace(best, noise_multiplier=best.noise_multiplier * 0.998)
    assert epsilon(less, steps=steps, delta=DELTA, sampling_rate=rate) > spent
    # The aim: no more noise than where all data lie in one place.
    assert best.noise_multiplier <= 1.002 * calibrate(spent, DELTA, Schedule(steps, rate, 1.0))


def test_noise_that_can_not_be_reached_is_refused():
    coarse_words = replace(SILOS, word_bits=16, dimension=10**6)
    with pytest.raises(InputError, match="epsilon = 1: no noise multiplier up to 10000") as refused:
        calibrated(coarse_words, 1.0, steps=50, delta=DELTA)
    assert "min_honest = 15 of 20 silos" in str(refused.value) and "\n" not in str(refused.value)


def test_rounding_that_outweighs_a_unit_is_refused():
    coarse_words = replace(SILOS, word_bits=16, dimension=10**6, noise_multiplier=30.0)
    with pytest.raises(InputError, match="rounding 1000000 values of 20 silos would cost more"):
        epsilon(coarse_words, steps=1, delta=DELTA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"delta": 0.0}, "delta"),
        ({"delta": float("nan")}, "delta"),
        ({"rate": 0.0}, "sampling_rate"),
        ({"rate": 1.5}, "sampling_rate"),
        ({"noise": SILOS, "rate": 0.5}, "who takes part is known"),
    ],
)
def test_what_can_not_be_accounted_for_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        charge(**change)
