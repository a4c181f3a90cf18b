"""The audit: its bound against closed forms and simulations, and its power against an engine that was broken."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom, binomtest

from configs.errors import InputError, SiloweaveError
from privacy.audit.bound import (
    FAIL_CONFIDENCE,
    REFERENCE_PLAN,
    Finding,
    audited_bound,
    epsilon_lower_bound,
    fair_coins,
    judge,
    num_guesses,
    overall,
    p_value,
)
from privacy.audit.canaries import probe_alone
from privacy.clipping.clipping import clipping
from privacy.mechanism.noise import noised
from privacy.mechanism.sampler import poisson_sample
from privacy.mechanism.streams import Streams
from privacy.plan import PrivacyPlan

DIGEST = "ab" * 32
CANARIES = 2000


@pytest.mark.parametrize(("guesses", "correct"), [(10, 9), (100, 70), (250, 210), (1000, 1000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
def test_without_delta_the_bound_is_clopper_and_pearsons(guesses, correct, confidence):
    accuracy = beta.ppf(1 - confidence, correct, guesses - correct + 1)
    expected = max(0.0, math.log(accuracy / (1 - accuracy)))
    assert epsilon_lower_bound(2000, guesses, correct, 0.0, confidence) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(("guesses", "correct", "epsilon"), [(20, 15, 0.3), (50, 40, 1.0), (200, 60, 0.2), (9, 9, 2.0)])
def test_the_p_value_is_the_theorems_written_out(guesses, correct, epsilon):
    accuracy = math.exp(epsilon) / (math.exp(epsilon) + 1)
    pmf = [math.comb(guesses, k) * accuracy**k * (1 - accuracy) ** (guesses - k) for k in range(guesses + 1)]
    worst = max(sum(pmf[correct - i : correct]) / i for i in range(1, correct + 1))
    expected = sum(pmf[correct:]) + 2 * 500 * 1e-4 * worst
    assert p_value(500, guesses, correct, epsilon, 1e-4) == pytest.approx(min(1.0, expected), rel=1e-9)


counts = st.tuples(st.integers(1, 400), st.floats(0, 1)).map(lambda pair: (pair[0], round(pair[0] * pair[1])))


@settings(max_examples=60, deadline=None)
@given(counts=counts, delta=st.sampled_from([0.0, 1e-7, 1e-5, 1e-3]), confidence=st.sampled_from([0.9, 0.95, 0.999]))
def test_the_bound_is_monotone(counts, delta, confidence):
    guesses, correct = counts
    bound = epsilon_lower_bound(400, guesses, correct, delta, confidence)
    assert bound >= epsilon_lower_bound(400, guesses, max(0, correct - 1), delta, confidence) - 2e-6
    assert bound >= epsilon_lower_bound(400, guesses, correct, 2 * delta, confidence) - 2e-6
    assert bound >= epsilon_lower_bound(800, guesses, correct, delta, confidence) - 2e-6
    assert bound >= epsilon_lower_bound(400, guesses, correct, delta, confidence + 0.0005) - 2e-6
    for share in (0.25, 0.5, 0.75):  # whatever lies below the bound is refuted too
        assert bound == 0 or p_value(400, guesses, correct, share * bound, delta) < 1 - confidence


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.0), (0.5, 0.0), (1.5, 0.0), (0.5, 1e-3), (0.5, 0.02)])
def test_randomised_response_is_covered_at_least_as_often_as_stated(epsilon, delta):
    """Each coin is answered truthfully with e^eps / (1 + e^eps); with probability delta all are given away."""
    random, runs, canaries = np.random.default_rng(5), 2000, 100
    accuracy = 1 / (1 + math.exp(-epsilon))
    right = np.where(random.random(runs) < delta, canaries, random.binomial(canaries, accuracy, runs))
    bounds = {int(v): epsilon_lower_bound(canaries, canaries, int(v), delta, 0.95) for v in set(right)}
    wrong = sum(bounds[int(v)] > epsilon for v in right)
    assert binomtest(wrong, runs, 0.05, alternative="greater").pvalue > 1e-3
    if not delta:  # and it is not empty talk: about a twentieth of the runs is at the edge
        assert max(bounds.values()) > epsilon


def test_one_run_cannot_prove_a_large_epsilon():
    assert epsilon_lower_bound(9000, 9000, 9000, 0.0, 0.95) > 8
    assert epsilon_lower_bound(8900, 8900, 8900, 0.0, 0.95) < 8


@pytest.mark.parametrize(
    "arguments",
    [
        (100, 101, 5, 0.0, 0.95),
        (100, 10, 11, 0.0, 0.95),
        (100, 10, -1, 0.0, 0.95),
        (100, 10, 5, 1.0, 0.95),
        (100, 10, 5, -0.1, 0.95),
        (100, 10, 5, math.nan, 0.95),
        (100, 10, 5, 0.0, 1.0),
        (100, 10, 5, 0.0, 0.0),
        (100, 10, 5, 0.0, 95),
    ],
)
def test_counts_that_do_not_fit_are_refused(arguments):
    with pytest.raises(InputError, match="audit:"):
        epsilon_lower_bound(*arguments)


def test_an_audit_that_would_mean_nothing_is_an_error():
    claim = {"epsilon": 1.0, "delta": 0.0}
    coins, scores = fair_coins(200), np.zeros(200)
    with pytest.raises(SiloweaveError, match="not fair"):
        judge("all in", scores, np.ones(200, dtype=bool), 10, **claim)
    with pytest.raises(SiloweaveError, match="not finite"):
        judge("diverged", np.full(200, np.nan), coins, 10, **claim)
    for wrong in ({"guesses": 0}, {"guesses": 201}, {"guesses": 10, "share": 0.0}, {"guesses": 10, "share": 1.1}):
        with pytest.raises(InputError, match="0 < share <= 1"):
            judge("counts", scores, coins, **wrong, **claim)
    with pytest.raises(InputError, match="one of each"):
        judge("shapes", scores[:5], coins, 10, **claim)
    with pytest.raises(InputError, match="one of each"):
        judge("probabilities", scores, coins.astype(float), 10, **claim)


def test_scores_that_know_nothing_show_nothing_and_scores_that_know_all_show_much():
    coins = fair_coins(2000)
    blind = judge("blind", np.zeros(2000), coins, 250, epsilon=0.01, delta=1e-9)
    knowing = judge("knowing", coins.astype(float), coins, 250, epsilon=0.01, delta=1e-9)
    assert blind.bound(FAIL_CONFIDENCE) <= 0.6
    assert (knowing.correct, knowing.verdict) == (250, "fail")


def test_verdicts_and_the_correction_for_all_scores_tried():
    def finding(correct, share=1.0):
        return Finding("score", 2000, 250, correct, epsilon=0.5, delta=0.0, share=share)

    assert [finding(correct).verdict for correct in (150, 172, 190)] == ["pass", "warn", "fail"]
    assert finding(172, share=0.05).verdict == "pass"
    once, often = finding(190).bound(0.95), finding(190, share=0.05).bound(0.95)
    assert often == pytest.approx(epsilon_lower_bound(2000, 250, 190, 0.0, 1 - 0.05 * 0.05))
    assert often < once
    assert overall([finding(150), finding(172)]) == "warn"
    assert overall([finding(172), finding(190), finding(150)]) == "fail"
    assert overall([finding(150)]) == "pass"
    assert audited_bound([finding(150), finding(190)]) == {
        "epsilon_lower_bound": once,
        "confidence": 0.95,
        "canaries": 2000,
        "guesses": 250,
        "correct": 190,
        "mode": "score",
    }


def test_coins_are_fair_and_fresh():
    coins = fair_coins(20_001)
    assert (coins.shape, coins.dtype) == ((20_001,), np.bool_)
    assert binomtest(int(coins.sum()), coins.size).pvalue > 1e-12  # which is how often each of these fails by chance
    assert binom.cdf((coins != fair_coins(20_001)).sum(), coins.size, 0.5) > 1e-12


def audit(seed):
    """The engine alone at the reference plan; seeded, so that the test gives the same on every run."""
    coins = np.random.default_rng(seed).integers(2, size=CANARIES).astype(bool)
    scores = probe_alone(REFERENCE_PLAN.bind(CANARIES), Streams(bytes([seed]) * 32, DIGEST), coins)
    guesses = num_guesses(REFERENCE_PLAN, CANARIES)
    return judge("gradient", scores, coins, guesses, epsilon=REFERENCE_PLAN.epsilon, delta=REFERENCE_PLAN.delta)


def test_the_reference_plan_is_where_one_run_has_power():
    assert REFERENCE_PLAN.epsilon == pytest.approx(0.386, abs=1e-3)
    assert REFERENCE_PLAN.model_copy(update={"noise_multiplier": 0.5}).epsilon == pytest.approx(9.16, abs=0.01)
    assert num_guesses(REFERENCE_PLAN, CANARIES) == 250


def test_the_engine_passes_its_audit():
    assert [audit(seed).verdict for seed in range(10)] == ["pass"] * 10


def test_too_little_noise_is_caught(monkeypatch):
    honest = PrivacyPlan.noise_std.fget
    monkeypatch.setattr(PrivacyPlan, "noise_std", property(lambda plan: honest(plan) / 4))
    assert [audit(seed).verdict for seed in range(10)] == ["fail"] * 10


def test_no_clipping_is_caught(monkeypatch):
    monkeypatch.setattr(
        "privacy.mechanism.dp_sgd.clipping",
        lambda model, norm, *rest, **more: clipping(model, 1e3 * norm, *rest, **more),
    )
    assert [audit(seed).verdict for seed in range(10)] == ["fail"] * 10


def test_the_scores_are_those_of_the_noised_sums_written_by_hand():
    """What the auditor scores: clipped to the norm C, summed, noised. Nothing that was not released."""
    plan, streams = REFERENCE_PLAN.bind(300), Streams(b"s" * 32, DIGEST)
    coins = np.random.default_rng(0).integers(2, size=300).astype(bool)
    found = probe_alone(plan, streams, coins)
    ins, expected = np.flatnonzero(coins), np.zeros(300)
    for step in range(plan.terms.steps_per_round):
        total = np.zeros(300)
        total[ins[poisson_sample(plan, streams, step, len(ins))]] = plan.terms.max_grad_norm
        seen = noised(torch.from_numpy(total)[None], plan.noise_std, streams, step, "layer.weight").double().numpy()[0]
        densities = [np.exp(-((seen - mean) ** 2) / (2 * 0.5**2)) for mean in (0, 1)]
        expected += np.log((0.97 * densities[0] + 0.03 * densities[1]) / densities[0])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
