"""How well an attack tells members from others: figures for scores, whatever they were computed from."""

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, mannwhitneyu, norm, rankdata

from configs.errors import InputError

LOW_FALSE_POSITIVE_RATES = (0.001, 0.01)
CONFIDENCE = 0.95
_ROC_POINTS = 200

Scores = npt.NDArray[np.float64]


def membership_figures(members: Scores, others: Scores) -> dict[str, Any]:
    """AUC with its interval, true-positive rates at low false-positive rates (Carlini et al. 2022), and the curve.

    A rate below one in the number of others is reached with no false positive at all. Of no members, or no others,
    there is no figure: None, and an empty curve.

    Args:
        members: (N,), higher where the attack says "member".
        others: (K,)

    Raises:
        InputError: a score is not finite.
    """
    for name, scores in (("members", members), ("others", others)):
        if not np.isfinite(scores).all():
            raise InputError(f"membership inference: {scores.size} scores of {name}, not all finite; nothing to show")
    counts = {"members": members.size, "others": others.size}
    if not members.size or not others.size:
        rates = dict.fromkeys(f"{rate:g}" for rate in LOW_FALSE_POSITIVE_RATES)
        nothing: dict[str, list[float]] = {"false_positive_rate": [], "true_positive_rate": []}
        return {**counts, "auc": None, "auc_interval": None, "true_positive_rate_at": rates, "roc": nothing}
    statistic = mannwhitneyu(members, others).statistic
    false_rates, true_rates = roc(members, others)
    # Dense where false positives are few: that end of the curve is what matters.
    kept = np.unique(np.geomspace(1, len(false_rates), _ROC_POINTS).round().astype(int)) - 1
    return {
        **counts,
        "auc": float(statistic / (members.size * others.size)),
        "auc_interval": auc_interval(members, others),
        "true_positive_rate_at": {
            f"{rate:g}": true_positive_rate(members, others, rate) for rate in LOW_FALSE_POSITIVE_RATES
        },
        "roc": {"false_positive_rate": false_rates[kept].tolist(), "true_positive_rate": true_rates[kept].tolist()},
    }


def auc_interval(members: Scores, others: Scores) -> list[float] | None:
    """The AUC's 95% confidence interval (DeLong et al. 1988); None where a side has fewer than two scores.

    Where all members are above all others, or below, DeLong's variance is zero. What is known then is that of so many
    pairs that share no record each was told apart.
    """
    fewer = min(members.size, others.size)
    if fewer < 2:
        return None
    ranks = rankdata(np.concatenate([members, others]))
    # How many of the other side each score is above, ties counted half.
    above = (ranks[: members.size] - rankdata(members)) / others.size
    below = 1 - (ranks[members.size :] - rankdata(others)) / members.size
    auc = float(above.mean())
    deviation = float(np.sqrt(above.var(ddof=1) / members.size + below.var(ddof=1) / others.size))
    if deviation == 0 and auc in (0.0, 1.0):
        told = binomtest(round(auc * fewer), fewer).proportion_ci(CONFIDENCE)
        return [float(told.low), float(told.high)]
    width = float(norm.ppf((1 + CONFIDENCE) / 2)) * deviation
    return [max(0.0, auc - width), min(1.0, auc + width)]


def roc(members: Scores, others: Scores) -> tuple[Scores, Scores]:
    """False- and true-positive rates of "above t", for each t that matters, from (0, 0) to (1, 1)."""
    thresholds = np.unique(np.concatenate([members, others]))[::-1]
    false_rates = 1 - np.searchsorted(np.sort(others), thresholds, side="left") / others.size
    true_rates = 1 - np.searchsorted(np.sort(members), thresholds, side="left") / members.size
    return np.concatenate([[0.0], false_rates]), np.concatenate([[0.0], true_rates])


def true_positive_rate(members: Scores, others: Scores, false_positive_rate: float) -> float:
    """Share of the members above the lowest threshold that keeps the false-positive rate."""
    allowed = int(false_positive_rate * others.size)
    threshold = np.sort(others)[::-1][allowed]
    return float((members > threshold).mean())


def exposure(canary_losses: Scores, candidate_losses: Scores) -> Scores:
    """How far canaries stand out among candidates of their format, in bits (Carlini et al. 2019).

    Args:
        canary_losses: (M,)
        candidate_losses: (K,), of random candidates that nothing was trained on.

    Returns:
        (M,): log2 of the candidates, the canary included, minus log2 of its rank by loss; ties count against it.
        One that was never seen has about 1.44 bits on average.
    """
    ranks = 1 + np.searchsorted(np.sort(candidate_losses), canary_losses, side="right")
    return np.asarray(np.log2(candidate_losses.size + 1) - np.log2(ranks), dtype=np.float64)
