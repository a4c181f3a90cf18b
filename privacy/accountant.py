"""From a schedule to epsilon. dp-accounting's PLD, pessimistic, decides; RDP and Opacus' PRV stand beside it."""

import logging
import math
import warnings
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from configs.errors import InputError, SiloweaveError

_COARSE = 5e-3
_SIGMA_TOLERANCE = 1e-3
_SMALLEST_SIGMA, _LARGEST_SIGMA = 0.2, 1e4
_STRIDE = 0.4  # in log sigma


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
    q: float, sigma: float, steps: int, delta: float, *, pessimistic: bool = True, interval: float | None = None
) -> float:
    """Epsilon of ``steps`` Poisson-subsampled Gaussians under add-or-remove-one.

    Composes privacy-loss distributions (Koskela et al. 2020; Doroshenko et al. 2022; dp-accounting).

    Args:
        q: sampling rate.
        sigma: noise multiplier.
        steps: number of steps.
        delta: delta.
        pessimistic: an upper bound; otherwise dp-accounting's lower estimate.
        interval: width of the privacy loss' bins; smaller is tighter and slower. Every width gives an upper bound;
            None takes one that costs less than a part in a thousand of epsilon.
    """
    from dp_accounting.pld import privacy_loss_distribution as pld

    single = pld.from_gaussian_mechanism(
        sigma,
        sampling_prob=q,
        pessimistic_estimate=pessimistic,
        value_discretization_interval=interval or _interval(steps),
        use_connect_dots=pessimistic,  # the tighter construction has no lower estimate
    )
    return float(single.self_compose(steps).get_epsilon_for_delta(delta))


def _interval(steps: int) -> float:
    """What rounding to bins adds grows with the steps, and so the bins shrink with them."""
    return min(1e-3, max(1e-4, 0.1 / steps))


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
    """The smallest noise multiplier (to one part in a thousand, at least 0.13) whose schedule spends at most epsilon.

    Raises:
        InputError: no noise multiplier up to 10,000 is enough.
    """
    from scipy.optimize import brentq

    def excess(log_sigma: float, interval: float | None = None) -> float:
        return pld_epsilon(q, math.exp(log_sigma), steps, delta, interval=interval) - epsilon

    # Wide bins are fast and err on the safe side: they bracket the answer, which narrow bins then find.
    high = 0.0
    while excess(high, _COARSE) > 0:
        high += _STRIDE
        if math.exp(high) > _LARGEST_SIGMA:
            raise InputError(
                f"privacy.epsilon is {epsilon:g}: no noise multiplier up to {_LARGEST_SIGMA:g} reaches it with {steps} "
                f"steps at sampling rate {q:g} and delta {delta:g}; raise privacy.epsilon, or lower rounds or steps"
            )
    low = high - _STRIDE
    while excess(low, _COARSE) <= 0 and math.exp(low) > _SMALLEST_SIGMA:
        low, high = low - _STRIDE, low
    if excess(low) > 0:
        low = brentq(excess, low, high, xtol=_SIGMA_TOLERANCE / 2)
    # The root is good to the tolerance; one step up makes sure that it lies on the safe side.
    sigma = math.ceil(math.exp(low) * 1e4) / 1e4
    while pld_epsilon(q, sigma, steps, delta) > epsilon:
        sigma = math.ceil(sigma * (1 + _SIGMA_TOLERANCE / 4) * 1e4) / 1e4
    return sigma
