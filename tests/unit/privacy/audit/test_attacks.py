"""Figures of attacks against brute force."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from configs.errors import InputError
from privacy.audit.attacks import auc_interval, exposure, membership_figures, roc, true_positive_rate

scores = st.lists(st.integers(-5, 5), min_size=1, max_size=30).map(lambda values: np.array(values, dtype=float))


@settings(max_examples=100, deadline=None)
@given(members=scores, others=scores)
def test_the_figures_are_those_of_counting_pairs_and_thresholds(members, others):
    figures = membership_figures(members, others)
    pairs = [(member > other) + 0.5 * (member == other) for member in members for other in others]
    assert figures["auc"] == pytest.approx(np.mean(pairs))
    for rate in (0.001, 0.01, 0.2):
        reached = [
            np.mean(members > threshold)
            for threshold in [-np.inf, *others, *members]
            if np.mean(others > threshold) <= rate
        ]
        assert true_positive_rate(members, others, rate) == pytest.approx(max(reached))
    false_rates, true_rates = roc(members, others)
    assert (false_rates[0], true_rates[0], false_rates[-1], true_rates[-1]) == (0, 0, 1, 1)
    assert (np.diff(false_rates) >= 0).all()
    assert (np.diff(true_rates) >= 0).all()
    assert np.trapezoid(true_rates, false_rates) == pytest.approx(np.mean(pairs))


def interval_by_pairs(members, others):
    """DeLong's variance from its definition, over all pairs."""
    won = (members[:, None] > others) + 0.5 * (members[:, None] == others)
    variance = won.mean(axis=1).var(ddof=1) / len(members) + won.mean(axis=0).var(ddof=1) / len(others)
    reach = 1.959963984540054 * np.sqrt(variance)
    return max(0.0, won.mean() - reach), min(1.0, won.mean() + reach)


@pytest.mark.parametrize("ties", [False, True])
def test_the_interval_is_delongs_and_the_auc_is_sklearns(ties):
    random = np.random.default_rng(3)
    for members, others, apart in [(2, 2, 0.0), (5, 40, 1.0), (60, 30, 0.3), (33, 34, 2.5)]:
        scores = random.normal(size=members) + apart, random.normal(size=others)
        scores = tuple(np.round(one) if ties else one for one in scores)
        found = membership_figures(*scores)
        labels = np.repeat([1, 0], [members, others])
        assert found["auc"] == pytest.approx(roc_auc_score(labels, np.concatenate(scores)))
        if found["auc"] not in (0, 1):
            assert found["auc_interval"] == pytest.approx(interval_by_pairs(*scores))


@pytest.mark.parametrize("apart", [0.0, 0.5, 1.5])
def test_the_interval_holds_the_true_auc_as_often_as_it_says(apart):
    random, true = np.random.default_rng(4), norm.cdf(apart / np.sqrt(2))
    intervals = [auc_interval(random.normal(size=60) + apart, random.normal(size=80)) for _ in range(1000)]
    assert 0.93 < np.mean([low <= true <= high for low, high in intervals]) < 0.97  # within three deviations


def test_the_interval_of_a_perfect_attack_is_not_a_point():
    """DeLong's variance is zero then. Twenty disjoint pairs that were told apart leave room for an AUC of 0.83."""
    low, high = auc_interval(np.arange(100.0) + 100, np.arange(20.0))
    assert (low, high) == (pytest.approx(0.025 ** (1 / 20)), 1.0)
    assert auc_interval(np.arange(20.0), np.arange(20.0) + 30) == pytest.approx([0.0, 1 - 0.025 ** (1 / 20)])
    assert auc_interval(np.ones(5), np.ones(5)) == [0.5, 0.5]
    assert auc_interval(np.ones(1), np.zeros(5)) is None


def test_a_perfect_attack_and_a_blind_one():
    random = np.random.default_rng(0)
    perfect = membership_figures(random.random(2000) + 1, random.random(2000))
    assert (perfect["auc"], perfect["true_positive_rate_at"]) == (1.0, {"0.001": 1.0, "0.01": 1.0})
    blind = membership_figures(random.random(20_000), random.random(20_000))
    assert blind["auc"] == pytest.approx(0.5, abs=0.02)
    assert blind["true_positive_rate_at"]["0.01"] == pytest.approx(0.01, abs=0.005)
    assert len(blind["roc"]["false_positive_rate"]) <= 200
    assert blind["roc"]["false_positive_rate"][-1] == 1


@settings(max_examples=50, deadline=None)
@given(
    value=st.floats(-1e6, 1e6),
    members=st.integers(0, 3),
    others=st.integers(0, 3),
)
def test_no_score_has_no_figure_and_equal_ones_tell_nothing(value, members, others):
    figures = membership_figures(np.full(members, value), np.full(others, value))
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert (figures["members"], figures["others"]) == (members, others)
    blind = members and others
    assert figures["auc"] == (0.5 if blind else None)
    assert figures["true_positive_rate_at"] == dict.fromkeys(["0.001", "0.01"], 0.0 if blind else None)
    curve = [0.0, 1.0] if blind else []
    assert figures["roc"] == {"false_positive_rate": curve, "true_positive_rate": curve}


@pytest.mark.parametrize("bad", [[np.nan], [np.inf, 1.0]])
def test_scores_that_are_none_are_refused(bad):
    for pair in ((np.array(bad), np.ones(3)), (np.ones(3), np.array(bad))):
        with pytest.raises(InputError, match="membership inference"):
            membership_figures(*pair)


def test_exposure_is_bits_of_rank():
    candidates = np.arange(1.0, 1024.0)
    found = exposure(np.array([0.0, 1.0, 511.5, 9999.0]), candidates)
    np.testing.assert_allclose(found, [10.0, 9.0, 1.0, 0.0])
    random = np.random.default_rng(1)
    assert exposure(random.random(5000), random.random(5000)).mean() == pytest.approx(1 / np.log(2), abs=0.1)
