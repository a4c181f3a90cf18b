"""From a schedule to epsilon. The pessimistic PLD of dp-accounting decides; RDP and PRV are for comparison."""

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from configs.errors import InputError, SiloweaveError
from privacy.accounting.opacus_prv import prv_accountant
from privacy.accounting.schedule import Schedule
from privacy.accounting.size import LARGEST_BINS, check_size

_SMALLEST_SIGMA, _LARGEST_SIGMA = 0.2, 1e4
_ROUGH = 8  # times the usual width of bins
_STRIDE, _PROBE, _TOLERANCE = 0.4, 0.02, 5e-4  # in log sigma


@dataclass(frozen=True)
class Guarantee:
    """(epsilon, delta) of a schedule.

    Attributes:
        epsilon: the claim: pessimistic PLD.
        delta: the delta at which all these epsilons hold.
        epsilon_optimistic: PLD's lower estimate; never above ``epsilon``.
        epsilon_rdp: Renyi accounting, for comparison; None where it is not available.
        epsilon_prv: Opacus' PRV accountant (upper bound), for comparison; None where it is not available.
    """

    epsilon: float
    delta: float
    epsilon_optimistic: float
    epsilon_rdp: float | None
    epsilon_prv: float | None

    def as_dict(self) -> dict[str, Any]:
        """The attributes by name, for reports."""
        return asdict(self)


@lru_cache(maxsize=512)
def schedule_epsilon(
    schedule: Schedule, delta: float, *, pessimistic: bool = True, width: float | None = None
) -> float:
    """Epsilon of a whole schedule.

    Composes privacy-loss distributions (Koskela et al. 2020; Doroshenko et al. 2022; dp-accounting).

    Args:
        schedule: what is released.
        delta: delta of all of it.
        pessimistic: an upper bound; otherwise dp-accounting's lower estimate.
        width: width of the privacy loss' bins; every width gives an upper bound. None takes one that costs less than a
            part in a thousand of epsilon.

    Raises:
        PolicyRefusal: nothing should account for a schedule of this size; see ``privacy.accounting.size``.
    """
    if schedule.rarely_in(delta):
        return 0.0
    check_size(schedule, width)
    unknown = math.inf if pessimistic else 0.0
    if schedule.hopeless:
        return unknown
    pld = schedule.pld(pessimistic=pessimistic, width=width or schedule.width())
    try:
        return float(pld.get_epsilon_for_delta(schedule.accounted_delta(delta)))
    except OverflowError:  # the search has come to losses below -709, without an answer
        return unknown


@lru_cache(maxsize=64)
def guarantee(schedule: Schedule, delta: float) -> Guarantee:
    """The guarantee of a schedule, with the other accountants beside it.

    Raises:
        SiloweaveError: the accountant contradicts itself (its optimistic bound above its pessimistic one).
    """
    epsilon = schedule_epsilon(schedule, delta)
    optimistic = schedule_epsilon(schedule, delta, pessimistic=False)
    if not math.isfinite(epsilon) or optimistic > epsilon:
        raise SiloweaveError(
            f"the accountant gives epsilon {epsilon} with a lower estimate of {optimistic} for {schedule} at delta "
            f"{delta}: no claim can be made; raise privacy.noise_multiplier or lower the steps"
        )
    return Guarantee(
        epsilon=epsilon,
        delta=delta,
        epsilon_optimistic=optimistic,
        epsilon_rdp=_rdp_epsilon(schedule, delta),
        epsilon_prv=_prv_epsilon(schedule, delta),
    )


def _rdp_epsilon(schedule: Schedule, delta: float) -> float | None:
    from dp_accounting.rdp import RdpAccountant

    accountant, event = RdpAccountant(), schedule.event()
    if not accountant.supports(event):
        return None
    # It logs one line for every order that does not converge; those orders are left out, which is sound.
    absl = logging.getLogger("absl")
    before = absl.level
    absl.setLevel(logging.ERROR)
    try:
        return float(accountant.compose(event).get_epsilon(delta))
    finally:
        absl.setLevel(before)


def _prv_epsilon(schedule: Schedule, delta: float) -> float | None:
    class Bounded(prv_accountant()):  # type: ignore[misc]
        """Chooses its own number of bins, which ``check_size`` doesn't bound: so it is bounded here."""

        def _get_domain(self, *args: Any, **options: Any) -> Any:
            domain = super()._get_domain(*args, **options)
            if domain.size > LARGEST_BINS:
                raise MemoryError(f"{domain.size} bins")
            return domain

    if schedule.truncation is not None:
        return None
    accountant = Bounded()
    steps = (schedule.noise_multiplier, schedule.sampling_rate, schedule.steps)
    accountant.history = [steps, *((sigma, 1.0, count) for sigma, count in schedule.releases)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            epsilon = float(accountant.get_epsilon(delta))
        except (ValueError, RuntimeError, MemoryError):  # its discretisation fails on some schedules
            return None
    return epsilon if math.isfinite(epsilon) else None


@lru_cache(maxsize=64)
def calibrate(epsilon: float, delta: float, schedule: Schedule) -> float:
    """The smallest noise multiplier of the steps (to a part in a thousand, at least 0.2) that spends at most epsilon.

    Args:
        epsilon: of the whole schedule.
        delta: of the whole schedule.
        schedule: what is released; the noise of its steps is what is looked for, that of its releases is given.

    Raises:
        InputError: no noise multiplier up to 10,000 is enough.
    """

    def excess(log_sigma: float, rough: float = 1.0) -> float:
        trial = schedule.with_noise(math.exp(log_sigma))
        return schedule_epsilon(trial, delta, width=rough * trial.width()) / epsilon - 1

    # Wide bins are fast and err on the safe side: they come close, and narrow bins finish.
    low, high = _bracket(lambda log_sigma: excess(log_sigma, _ROUGH))
    if high is None:
        beside = " beside the metric releases" if schedule.releases else ""
        raise InputError(
            f"privacy.epsilon is {epsilon:g}: no noise multiplier up to {_LARGEST_SIGMA:g} reaches it with "
            f"{schedule.steps} steps at sampling rate {schedule.sampling_rate:g} and delta {delta:g}{beside}; raise "
            "privacy.epsilon, or lower rounds or steps"
        )
    if low is None:
        return _SMALLEST_SIGMA
    return _polish(excess, low, high)


def _bracket(excess: Callable[[float], float]) -> tuple[float | None, float | None]:
    """Two neighbours in log sigma with the root between them; None where it lies beyond the limits."""
    smallest, largest = math.log(_SMALLEST_SIGMA), math.log(_LARGEST_SIGMA)
    high = 0.0
    while excess(high) > 0:
        if high >= largest:
            return high, None
        high = min(high + _STRIDE, largest)
    low = high - _STRIDE
    while excess(low) <= 0:
        if low <= smallest:
            return None, low
        low, high = max(low - _STRIDE, smallest), low
    return low, high


def _polish(excess: Callable[..., float], low: float, high: float) -> float:
    """The noise multiplier at the root, a little on the safe side of it, on a grid of 1e-4."""
    from scipy.optimize import brentq

    root = float(brentq(excess, low, high, args=(_ROUGH,), xtol=_TOLERANCE))
    slope = (excess(root + _PROBE, _ROUGH) - excess(root - _PROBE, _ROUGH)) / (2 * _PROBE)
    while True:
        root = math.log(math.ceil(math.exp(root) * 1e4) / 1e4)
        found = excess(root)
        if 2 * _TOLERANCE * slope <= found <= 0:
            return round(math.exp(root), 4)
        root += _TOLERANCE - found / slope
