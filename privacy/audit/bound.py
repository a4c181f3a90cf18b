"""Auditing with one training run: a lower bound on epsilon that the mechanism itself has shown.

Canaries are put into the training data by fair coins. From released values alone an auditor guesses which ones are in.
Under (epsilon, delta)-DP it can't be right too often (Steinke, Nasr and Jagielski 2023, theorem 5.2), so what it gets
right bounds epsilon from below. Everything here works on scores and coins; how scores come about is in canaries.py.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import binom, binomtest

from configs.errors import InputError, SiloweaveError
from privacy.plan import PlanTerms

Verdict = Literal["pass", "warn", "fail"]
FAIL_CONFIDENCE, WARN_CONFIDENCE = 0.999, 0.95
_UNFAIR = 1e-9
_GUESSED_SHARE = 3 / 8
_EPSILON_TOLERANCE = 1e-6
_LARGEST_EPSILON = 64.0

# One run can't prove a large epsilon. At this plan (epsilon 0.39) it has the power to catch a broken mechanism.
REFERENCE_PLAN = PlanTerms(
    sampling_rate=0.03, max_grad_norm=1.0, noise_multiplier=2.0, rounds=1, steps_per_round=36, delta=1e-5
)


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """How likely so many right guesses are, at most, under (epsilon, delta)-DP; theorem 5.2 of Steinke et al. 2023.

    Without delta, the right guesses are dominated by a binomial of randomised response (theorem 5.1). Delta adds
    ``2 m delta max_i P[v - i <= W < v] / i``.

    Args:
        canaries: m, each included by a fair coin of its own.
        guesses: r, guesses made; the auditor abstains on the rest.
        correct: v, guesses that were right.
        epsilon: the hypothesis.
        delta: the hypothesis.

    Raises:
        InputError: not 0 <= correct <= guesses <= canaries, or epsilon or delta out of range.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise InputError(
            f"audit: {correct} right of {guesses} guesses about {canaries} canaries; a count exceeds the next"
        )
    if not (epsilon >= 0 and 0 <= delta < 1):
        raise InputError(f"audit: epsilon {epsilon} and delta {delta}; expected epsilon >= 0 and 0 <= delta < 1")
    accuracy = 1 / (1 + np.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, accuracy))
    if not correct or not delta:
        return min(1.0, tail)
    just_below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, accuracy))
    worst = float((just_below / np.arange(1, correct + 1)).max())
    return min(1.0, tail + 2 * canaries * delta * worst)


def epsilon_lower_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    """The largest epsilon that the guesses refute, together with every smaller one; 0 where they refute none.

    The mechanism is not (epsilon, delta)-DP for any epsilon below the bound, with the given confidence.

    Raises:
        InputError: the counts don't fit together, or the confidence isn't in (0, 1).
    """
    if not 0 < confidence < 1:
        raise InputError(f"audit: confidence is {confidence}; give one above 0 and below 1")
    significance = 1 - confidence

    def refuted(epsilon: float) -> bool:
        return p_value(canaries, guesses, correct, epsilon, delta) < significance

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 0.0
    while high < _LARGEST_EPSILON and refuted(high):  # upwards from 0: all below the first unrefuted one are refuted
        low, high = high, high + 0.25
    while high - low > _EPSILON_TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def fair_coins(count: int) -> npt.NDArray[np.bool_]:
    """Which canaries are in: one coin per canary, from the operating system's randomness.

    The coins are never drawn from the charge's streams: sampling and noise come from those, and the coins have to be
    independent of both even where the streams are what is broken.
    """
    return np.unpackbits(np.frombuffer(os.urandom(-(-count // 8)), dtype=np.uint8))[:count].astype(np.bool_)


def num_guesses(plan: PlanTerms, canaries: int) -> int:
    """Guesses to make, fixed by the plan before anything is seen: 3/8 of the included canaries that a batch ever held.

    More would be guesses about canaries that no step has touched, fewer would waste what can be seen.
    """
    sampled = 1 - (1 - plan.sampling_rate) ** plan.steps
    return min(canaries, max(1, round(_GUESSED_SHARE * canaries / 2 * sampled)))


@dataclass(frozen=True)
class Finding:
    """What one score has shown about one claim.

    Attributes:
        mode: what the auditor saw, and of which canaries.
        canaries: canaries that a coin was tossed for.
        guesses: those with the highest scores, guessed to be in.
        correct: guesses that were right.
        epsilon: the claim that is audited.
        delta: of the claim and of the bound.
        share: share of the allowed error that was given to this score beforehand. Those of all scores tried on one
            claim add up to 1 at most, and so the confidence holds for all of them together (weighted Bonferroni).
    """

    mode: str
    canaries: int
    guesses: int
    correct: int
    epsilon: float
    delta: float
    share: float

    def bound(self, confidence: float) -> float:
        """Lower bound on epsilon that holds for all scores tried, together, with this confidence."""
        corrected = 1 - (1 - confidence) * self.share
        return epsilon_lower_bound(self.canaries, self.guesses, self.correct, self.delta, corrected)

    @property
    def verdict(self) -> Verdict:
        """``fail`` where the bound at 99.9% exceeds the claim, ``warn`` where the one at 95% does."""
        if self.bound(FAIL_CONFIDENCE) > self.epsilon:
            return "fail"
        return "warn" if self.bound(WARN_CONFIDENCE) > self.epsilon else "pass"

    def as_dict(self) -> dict[str, Any]:
        """The attributes, bounds and verdict, for reports."""
        return {
            **vars(self),
            "epsilon_lower_bound": self.bound(WARN_CONFIDENCE),
            "confidence": WARN_CONFIDENCE,
            "epsilon_lower_bound_at_fail_confidence": self.bound(FAIL_CONFIDENCE),
            "fail_confidence": FAIL_CONFIDENCE,
            "verdict": self.verdict,
        }


def judge(
    mode: str,
    scores: npt.NDArray[np.float64],
    coins: npt.NDArray[np.bool_],
    guesses: int,
    *,
    epsilon: float,
    delta: float,
    share: float = 1.0,
) -> Finding:
    """Guesses that the canaries with the highest scores are in, and counts how often that is right.

    Args:
        mode: name of the score.
        scores: (M,), from released values only; equal scores go by position.
        coins: (M,), which canaries were in.
        guesses: how many to guess, fixed before the scores were seen.
        epsilon: the claim.
        delta: of the claim.
        share: of the allowed error, where several scores or numbers of guesses are tried on one claim.

    Raises:
        SiloweaveError: the coins can't have been fair, or a score is not finite: the audit would mean nothing.
        InputError: shapes or counts that don't fit together.
    """
    if scores.shape != coins.shape or scores.ndim != 1 or coins.dtype != np.bool_:
        raise InputError(
            f"audit: scores {scores.shape} and coins {coins.shape} of {coins.dtype}; give one of each per canary"
        )
    if not (0 < guesses <= len(coins) and 0 < share <= 1):
        raise InputError(
            f"audit: {guesses} guesses of {len(coins)} canaries, share {share}; guess some, with 0 < share <= 1"
        )
    if not np.isfinite(scores).all():
        raise SiloweaveError(f"audit: {mode}: a score is not finite, so training has diverged; nothing is shown")
    if binomtest(int(coins.sum()), len(coins)).pvalue < _UNFAIR:
        raise SiloweaveError(f"audit: {coins.sum()} of {len(coins)} canaries are in: those coins were not fair")
    guessed = np.argsort(-scores, kind="stable")[:guesses]
    return Finding(mode, len(coins), guesses, int(coins[guessed].sum()), epsilon, delta, share)


def overall(findings: Sequence[Finding]) -> Verdict:
    """The worst verdict."""
    verdicts = {finding.verdict for finding in findings}
    return "fail" if "fail" in verdicts else "warn" if "warn" in verdicts else "pass"


def audited_bound(findings: Sequence[Finding]) -> dict[str, Any]:
    """The strongest bound of an audit, for the certificate."""
    best = max(findings, key=lambda finding: finding.bound(WARN_CONFIDENCE))
    names = ("epsilon_lower_bound", "confidence", "canaries", "guesses", "correct", "mode")
    return {name: best.as_dict()[name] for name in names}
