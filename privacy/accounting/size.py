"""How large a schedule's privacy-loss distribution would get, bounded before anything is built.

dp-accounting keeps one number per bin, and its Fourier transforms some ten per bin. How many bins a composition has
is decided by three numbers of one step: the range of its privacy loss, the loss' variance, and the width of the bins.
A plan comes from elsewhere, so the bound takes constant time and memory, whatever the plan says.
"""

import math
from dataclasses import dataclass

from configs.errors import PolicyRefusal
from privacy.accounting.schedule import AT_ONCE, Schedule

LARGEST_BINS = 2**23  # at most 2 GiB and some seconds
_SIGMAS = (1e-3, 1e12)
_TAIL = 9.8  # deviations at which dp-accounting cuts the noise off: a mass of exp(-50)
_LOG_TRUNCATED = math.log(2 / 1e-15)  # what it cuts off of each tail of a composition
_ORDERS = range(1, 21)  # orders of its Chernoff bounds, over the number of bins
_ROUNDING = 1e-16  # error in each bin


def check_size(schedule: Schedule, width: float | None = None, *, new: bool = False) -> None:
    """Refuses a schedule that no machine should account for.

    Args:
        schedule: what would be released.
        width: of the privacy loss' bins; None: the schedule's own.
        new: nothing was reserved for it yet.

    Raises:
        PolicyRefusal: its distribution may have too many bins, or a noise multiplier is out of reach.
    """
    for sigma in (schedule.noise_multiplier, *(sigma for sigma, _ in schedule.releases)):
        if not _SIGMAS[0] <= sigma <= _SIGMAS[1]:
            raise _refusal(f"noise multiplier {sigma:g}", f"{_SIGMAS[0]:g} to {_SIGMAS[1]:g}", "give one in between")
    needed = 0.0 if schedule.hopeless else bins(schedule, width or schedule.width())
    # Plans of version 1 are still read; their narrow bins may be more than those of a plan that is new.
    allowed = LARGEST_BINS * (2 if schedule.fixed_bins and not new else 1)
    if needed > allowed:
        raise _refusal(
            f"{needed:.3g} bins",
            f"{allowed:.3g}",
            f"{schedule.steps} steps at sampling rate {schedule.sampling_rate:g} and noise multiplier "
            f"{schedule.noise_multiplier:g} take too much memory to account for; lower the rounds, steps or metric "
            "releases",
        )


def bins(schedule: Schedule, width: float) -> float:
    """An upper bound on the bins of the composed distribution and of all that it is composed of, added up."""
    if schedule.sampling_rate == 1:
        return _gaussian(_precision(((schedule.noise_multiplier, schedule.steps), *schedule.releases))) / width
    rounding = _ROUNDING * (1 + 1 / width)  # a bin is a difference of deltas, over the width
    variance = _variance(schedule) / width**2 + 1 / 4  # 1/4: what rounding to bins adds
    step = _Loss(_span(schedule) / width + 3, variance, rounding)
    one_by_one = schedule.truncation is not None  # those bins are computed in Python, not by numpy
    total, loss, steps = (4 if one_by_one else 1) * step.bins, step, schedule.steps
    while steps > 1:
        loss, steps = loss.composed(min(steps, AT_ONCE)), math.ceil(steps / AT_ONCE)
        total += loss.bins
    return total + _gaussian(_precision(schedule.releases)) / width


@dataclass(frozen=True)
class _Loss:
    """A privacy loss on a grid: its range and variance with the width of a bin as the unit, and each bin's error."""

    bins: float
    variance: float
    rounding: float

    def composed(self, times: int) -> "_Loss":
        """The sum of several losses: dp-accounting's Chernoff bounds, with Bennett's bound for the unknown moments."""
        spans = (self._chernoff(order, times) for order in _ORDERS)
        return _Loss(min(times * self.bins, *spans) + 2, times * self.variance, _ROUNDING)

    def _chernoff(self, order: int, times: int) -> float:
        moment = self.variance / self.bins**2 * (math.exp(order) - 1 - order)
        rounded = self.bins * self.rounding * math.exp(order) / order
        return 2 * (times * math.log1p(moment + rounded) + _LOG_TRUNCATED) * self.bins / order


def _span(schedule: Schedule) -> float:
    """Range of a step's privacy loss, in nats, from one of the noise's cut-off tails to the other."""
    if schedule.truncation is None:
        return _one_sided(schedule.sampling_rate, schedule.noise_multiplier)
    return 2 * _one_sided(schedule.sampling_rate, schedule.noise_multiplier / 2)


def _one_sided(q: float, sigma: float) -> float:
    largest = (_TAIL + 0.5 / sigma) / sigma  # without sampling
    return _log_mean_exp(q, largest) + min(largest, -math.log1p(-q))


def _log_mean_exp(q: float, loss: float) -> float:
    """An upper bound on log(1 - q + q exp(loss))."""
    return math.log1p(q * math.expm1(loss)) if loss < 500 else max(0.0, math.log(q) + loss) + math.log(2)


def _variance(schedule: Schedule) -> float:
    """An upper bound on the variance of a step's privacy loss, in squared nats.

    With r the ratio of the densities, log(r)^2 is at most (r-1)^2 / r, which gives the first bound; for r above 1 it is
    at most r - 1, which gives the second; and sampling moves no loss away from zero, which gives the third.
    """
    q, sigma = schedule.sampling_rate, schedule.noise_multiplier / (1 if schedule.truncation is None else 2)
    without = (1 + 0.25 / sigma / sigma) / sigma / sigma
    chi_square = q * q * math.expm1(min(1 / sigma / sigma, 500)) / (1 - q)
    bound = min(chi_square, q * (1 + without) + math.log1p(-q) ** 2, without)
    return bound if schedule.truncation is None else 4 * bound


def _precision(releases: tuple[tuple[float, int], ...]) -> float:
    """Gaussian releases compose into one with this precision."""
    return sum(count / sigma**2 for sigma, count in releases)


def _gaussian(precision: float) -> float:
    """Range of a Gaussian release's privacy loss."""
    return 2 * _TAIL * math.sqrt(precision) + precision


def _refusal(asked: str, allowed: str, why: str) -> PolicyRefusal:
    return PolicyRefusal.of("accounting", asked, allowed, f"{asked}, allowed {allowed}: {why}")
