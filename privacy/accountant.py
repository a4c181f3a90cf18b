"""From a schedule to epsilon. dp-accounting's PLD, pessimistic, decides; RDP and Opacus' PRV stand beside it."""

import logging
import math
import warnings
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from configs.errors import InputError, SiloweaveError

_FINE, _COARSE = 1e-4, 2e-3
_SIGMA_TOLERANCE = 1e-3
_LARGEST_SIGMA = 1e4


@dataclass(frozen=True)
class Guarantee:
    """(epsilon, delta) of a schedule.

    Attributes:
        epsilon: the claim: pessimistic PLD.
        delta: at this delta.
        epsilon_optimistic: PLD's lower estimate; never above ``epsilon``.
        epsilon_rdp: Renyi accounting, for comparison.
        epsilon_prv: Opacus' PRV accountant (upper bound), for comparison; None where it is not available.
    """

    epsilon: float
    delta: float
    epsilon_optimistic: float
    epsilon_rdp: float
    epsilon_prv: float | None

    def as_dict(self) -> dict[str, Any]:
        """For reports."""
        return asdict(self)


@lru_cache(maxsize=256)
def pld_epsilon(
    q: float, sigma: float, steps: int, delta: float, *, pessimistic: bool = True, interval: float = _FINE
) -> float:
    """Epsilon of ``steps`` Poisson-subsampled Gaussians under add-or-remove-one.

    Composes privacy-loss distributions (Koskela et al. 2020; Doroshenko et al. 2022; dp-accounting).

    Args:
        q: sampling rate.
        sigma: noise multiplier.
        steps: number of steps.
        delta: delta.
        pessimistic: an upper bound; otherwise dp-accounting's lower estimate.
        interval: width of the privacy loss' bins; smaller is tighter and slower.
    """
    from dp_accounting.pld import privacy_loss_distribution as pld

    single = pld.from_gaussian_mechanism(
        sigma,
        sampling_prob=q,
        pessimistic_estimate=pessimistic,
        value_discretization_interval=interval,
        use_connect_dots=pessimistic,  # the tighter construction has no lower estimate
    )
    return float(single.self_compose(steps).get_epsilon_for_delta(delta))


@lru_cache(maxsize=64)
def dp_sgd_guarantee(q: float, sigma: float, steps: int, delta: float) -> Guarantee:
    """The guarantee of a DP-SGD schedule, with the other accountants beside it.

    Raises:
        SiloweaveError: the accountant contradicts itself (its optimistic bound above its pessimistic one).
    """
    epsilon = pld_epsilon(q, sigma, steps, delta)
    optimistic = pld_epsilon(q, sigma, steps, delta, pessimistic=False)
    if not math.isfinite(epsilon) or optimistic > epsilon:
        raise SiloweaveError(
            f"the accountant gives epsilon {epsilon} with a lower estimate of {optimistic} for q={q}, sigma={sigma}, "
            f"steps={steps}, delta={delta}: no claim can be made; raise privacy.noise_multiplier or lower the steps"
        )
    return Guarantee(
        epsilon=epsilon,
        delta=delta,
        epsilon_optimistic=optimistic,
        epsilon_rdp=_rdp_epsilon(q, sigma, steps, delta),
        epsilon_prv=_prv_epsilon(q, sigma, steps, delta),
    )


def _rdp_epsilon(q: float, sigma: float, steps: int, delta: float) -> float:
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    event = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
    # It logs one line for every order that does not converge; those orders are left out, which is sound.
    absl = logging.getLogger("absl")
    before = absl.level
    absl.setLevel(logging.ERROR)
    try:
        return float(RdpAccountant().compose(event, steps).get_epsilon(delta))
    finally:
        absl.setLevel(before)


def _prv_epsilon(q: float, sigma: float, steps: int, delta: float) -> float | None:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(sigma, q, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            epsilon = float(accountant.get_epsilon(delta))
        except (ValueError, RuntimeError, MemoryError):  # its discretisation fails on some schedules
            return None
    return epsilon if math.isfinite(epsilon) else None


@lru_cache(maxsize=64)
def calibrate(epsilon: float, delta: float, q: float, steps: int) -> float:
    """The smallest noise multiplier (to 1e-3, rounded up) whose schedule spends at most epsilon.

    Raises:
        InputError: no noise multiplier up to 10,000 is enough.
    """
    if pld_epsilon(q, _LARGEST_SIGMA, steps, delta, interval=_COARSE) > epsilon:
        raise InputError(
            f"privacy.epsilon is {epsilon:g}: no noise multiplier up to {_LARGEST_SIGMA:g} reaches it with {steps} "
            f"steps at sampling rate {q:g} and delta {delta:g}; raise privacy.epsilon, or lower the rounds or the steps"
        )
    # Coarse bins are fast and err on the safe side: their answer is an upper end, refined with fine bins.
    high = _bisect(0.1, _LARGEST_SIGMA, lambda sigma: pld_epsilon(q, sigma, steps, delta, interval=_COARSE) <= epsilon)
    sigma = _bisect(high * 0.9, high, lambda sigma: pld_epsilon(q, sigma, steps, delta) <= epsilon)
    rounded = math.ceil(sigma * 1e4) / 1e4
    if pld_epsilon(q, rounded, steps, delta) > epsilon:
        raise SiloweaveError(f"calibration missed: noise multiplier {rounded} spends more than epsilon {epsilon}")
    return rounded


def _bisect(low: float, high: float, enough: Any) -> float:
    """The upper end of an interval, narrower than the tolerance, whose upper end is enough noise."""
    if enough(low):
        return low
    while high / low > 1 + _SIGMA_TOLERANCE:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
