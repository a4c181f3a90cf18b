"""What a run of distributed sums guarantees: a proven upper bound of epsilon, and the noise for a given epsilon.

A sum is, within a factor of exp(+-3e-34) for each of its values, what can be computed from the release of a Gaussian
mechanism, whose noise multiplier is ``gaussian_noise_multiplier``. So the accountant of that mechanism accounts for
sums, too: also for Poisson samples, for many steps, and beside other releases. The proof, in full in
docs/secure_aggregation.md:

1. **Rounding** moves neighbours apart: they differ by ``sensitivity`` after it, but with a small probability, a share
   of delta.
2. **Shares**: a sum of discrete Gaussians is no discrete Gaussian, but its probabilities differ from one's by tiny
   factors (Kairouz, Liu, Steinke 2021, on the way to proposition 14).
3. **Discreteness**: a discrete Gaussian of variance v is, up to such factors, a Gaussian of variance v - s^2, whose
   values are rounded at random by discrete Gaussians of variance s^2 (Peikert 2010, theorem 3.1). Rounding is
   post-processing.

More honest silos than ``min_honest`` add independent noise, which is post-processing, too: the charge is the same.
"""

from bisect import bisect_left
from dataclasses import replace
from math import exp, log, pi, sqrt

from configs.errors import InputError
from privacy.accounting.accountant import Guarantee, calibrate, guarantee, schedule_epsilon
from privacy.accounting.schedule import Schedule
from privacy.distributed.distributed import FRACTION_BITS, DistributedNoise

_ROUNDING_SHARE = 0.01  # of delta: what is left to roundings that move neighbours farther apart than is charged
_SMOOTHING = 2.0  # s: deviation in steps of the rounding that makes a Gaussian discrete
# Each of the factors of 2 and 3 is within exp(+-5 exp(-2 pi^2 x)), where x is s^2 for discreteness, and for the k-th
# share that is added the variance of shares times k / (k + 1), which is 8 or more: these are lost in the sixth.
_CLOSENESS = 6 * exp(-2 * pi**2 * _SMOOTHING**2)
_GRID, _LARGEST = 1e-4, 1e4  # noise multipliers that are looked for


def sensitivity(noise: DistributedNoise, failure: float) -> float:
    """How far rounded vectors of neighbours differ in steps (2-norm), but with this probability over the dithers.

    The squared norm of a rounded v is at most abs(v)^2 + d/4 in the mean, and a sum of independent values, each of two
    points: so Hoeffding's inequality bounds it (as in Kairouz, Liu, Steinke 2021, theorem 1).
    """
    root = sqrt(noise.dimension)
    # What floating point and the fixed point before rounding add to the clip.
    exact = (noise.clip + noise.reach * 2.0**-37) / noise.step + root * 2.0**-FRACTION_BITS
    probable = exact**2 + noise.dimension / 4 + sqrt(-2 * log(failure)) * (exact + root / 2)
    return min(exact + root, sqrt(probable))


def gaussian_noise_multiplier(noise: DistributedNoise, *, steps: int, delta: float) -> float:
    """The noise multiplier of the Gaussian mechanism that bounds each of so many sums, with ``gaussian_delta`` for all.

    It never falls when the noise multiplier rises: a step has then at least as many of the shares' deviations, and a
    unit fewer.
    """
    variance = noise.min_honest * 4.0**noise.share_bits - _SMOOTHING**2
    return sqrt(variance) / sensitivity(noise, _ROUNDING_SHARE * delta / steps)


def gaussian_delta(noise: DistributedNoise, *, steps: int, delta: float) -> float:
    """What is left of delta for the Gaussian mechanism."""
    return delta * (1 - _ROUNDING_SHARE) * exp(-_excess(noise, steps))


def _excess(noise: DistributedNoise, steps: int) -> float:
    """Of the logarithm of all probabilities of a run, to either side."""
    return steps * noise.dimension * _CLOSENESS


def refuse_coarse(noise: DistributedNoise) -> None:
    """Refuses noise whose steps are so coarse that rounding would move neighbours farther apart than a unit does.

    Raises:
        InputError: they are.
    """
    if noise.dimension / 4 > (noise.clip / noise.step) ** 2:
        raise InputError(
            f"word_bits = {noise.word_bits}: rounding {noise.dimension} values of {noise.silos} silos would cost more "
            "than a unit does; give more word_bits, fewer silos, or a smaller reach"
        )


def as_gaussian(schedule: Schedule, delta: float, noise: DistributedNoise | None) -> Schedule:
    """A schedule of sums with the noise multiplier of the Gaussian mechanism that bounds each of them.

    Args:
        schedule: what is released.
        delta: of all of it.
        noise: of the sums; None: they have a Gaussian's own, and the schedule stays.
    """
    if noise is None:
        return schedule
    return schedule.with_noise(gaussian_noise_multiplier(noise, steps=schedule.steps, delta=delta))


def spent(schedule: Schedule, delta: float, noise: DistributedNoise | None) -> float:
    """Epsilon of what ``as_gaussian`` has given for the same delta and noise."""
    if noise is None:
        return schedule_epsilon(schedule, delta)
    left = gaussian_delta(noise, steps=schedule.steps, delta=delta)
    return schedule_epsilon(schedule, left) + 2 * _excess(noise, schedule.steps)


def guarantee_of(schedule: Schedule, delta: float, noise: DistributedNoise | None) -> Guarantee:
    """Its guarantee, with the other accountants' epsilons beside it."""
    if noise is None:
        return guarantee(schedule, delta)
    found = guarantee(schedule, gaussian_delta(noise, steps=schedule.steps, delta=delta))
    return replace(found, epsilon=spent(schedule, delta, noise), delta=delta)


def multiplier(epsilon: float, schedule: Schedule, delta: float, noise: DistributedNoise | None) -> float:
    """The smallest noise multiplier with which a whole schedule spends at most epsilon.

    Args:
        epsilon: of the whole schedule.
        schedule: what is released; the noise of its steps is what is looked for.
        delta: of the whole schedule.
        noise: of sums whose noise silos make together; its noise multiplier is not looked at. None: of other steps.

    Raises:
        InputError: none is enough.
    """
    if noise is None:
        return calibrate(epsilon, delta, schedule)
    rate, releases = schedule.sampling_rate, schedule.releases
    found = calibrated(noise, epsilon, steps=schedule.steps, delta=delta, sampling_rate=rate, releases=releases)
    return found.noise_multiplier


def epsilon(noise: DistributedNoise, *, steps: int, delta: float, sampling_rate: float = 1.0) -> float:
    """What so many sums spend.

    Args:
        noise: of each sum.
        steps: sums of the whole run.
        delta: of the whole run.
        sampling_rate: q of each record's Poisson sampling by its silo, secret as all of the silo's randomness. Where
            a silo is the unit it is 1, since who takes part is known.

    Raises:
        InputError: an argument is out of range, or rounding would outweigh a unit.
        PolicyRefusal: nothing should account for so large a schedule.
    """
    _check(noise, steps, delta, sampling_rate)
    refuse_coarse(noise)
    return spent(as_gaussian(Schedule(steps, sampling_rate, 1.0), delta, noise), delta, noise)


def calibrated(
    noise: DistributedNoise,
    target: float,
    *,
    steps: int,
    delta: float,
    sampling_rate: float = 1.0,
    releases: tuple[tuple[float, int], ...] = (),
) -> DistributedNoise:
    """The same with the smallest noise multiplier, to a part in a thousand, that spends at most so much.

    Args:
        noise: its noise multiplier is not looked at.
        target: epsilon of the whole run.
        steps: as in ``epsilon``.
        delta: as in ``epsilon``.
        sampling_rate: as in ``epsilon``.
        releases: Gaussian releases beside the sums: noise multiplier and number of each.

    Raises:
        InputError: no noise multiplier is enough, or as in ``epsilon``.
        PolicyRefusal: as in ``epsilon``.
    """
    _check(noise, steps, delta, sampling_rate)
    left = gaussian_delta(noise, steps=steps, delta=delta)
    wanted = Schedule(steps, sampling_rate, 1.0, releases=releases)
    needed = calibrate(target - 2 * _excess(noise, steps), left, wanted)

    def enough(multiple: int) -> bool:
        try:
            trial = replace(noise, noise_multiplier=round(multiple * _GRID, 4))
        except InputError:  # the vectors do not fit beside so little noise
            return False
        return gaussian_noise_multiplier(trial, steps=steps, delta=delta) >= needed

    multiples = range(int(needed / _GRID), int(_LARGEST / _GRID) + 1)
    place = bisect_left(multiples, True, key=enough)
    if place == len(multiples):
        raise InputError(
            f"epsilon = {target:g}: no noise multiplier up to {_LARGEST:g} reaches it with min_honest = "
            f"{noise.min_honest} of {noise.silos} silos, {noise.dimension} values and {noise.word_bits} bits; raise "
            "epsilon or word_bits, or lower reach or steps"
        )
    best = replace(noise, noise_multiplier=round(multiples[place] * _GRID, 4))
    refuse_coarse(best)
    return best


def _check(noise: DistributedNoise, steps: int, delta: float, sampling_rate: float) -> None:
    if steps < 1:
        raise InputError(f"steps = {steps}: give at least 1")
    if not 0 < delta < 1:
        raise InputError(f"delta = {delta}: give a number between 0 and 1")
    if not 0 < sampling_rate <= 1:
        raise InputError(f"sampling_rate = {sampling_rate}: give a number above 0, and at most 1")
    if sampling_rate < 1 and noise.unit_is_silo:
        raise InputError(
            f"sampling_rate = {sampling_rate}: reach is the clip, so that a silo is the unit, and who takes part is "
            "known; give 1"
        )
