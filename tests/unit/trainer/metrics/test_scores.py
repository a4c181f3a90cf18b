"""Intervals cover what they should, by units; the same seed gives the same; what has no interval says so."""

import math

import numpy as np
import pytest

from configs.errors import InputError
from trainer.metrics.scores import Scores


def mean_of(values):
    values = np.asarray(values, float)
    return Scores(len(values), lambda drawn: {"mean": float(values[drawn].mean())})


def test_scores_are_a_mapping_of_names_to_figures():
    scores = mean_of([0, 1, 1, 0])
    assert dict(scores) == {"mean": 0.5}
    assert scores["mean"] == 0.5
    assert len(scores) == 1


def test_an_interval_covers_a_binomial_rate_as_often_as_it_says():
    """The percentile interval of 100 draws covers a rate of 0.4 about 94 times in 100."""
    generator, rate, runs, covered = np.random.default_rng(5), 0.4, 250, 0
    for run in range(runs):
        low, high = mean_of(generator.random(100) < rate).intervals(seed=run, resamples=300)["mean"]
        covered += low <= rate <= high
    assert 0.91 <= covered / runs <= 0.98


def test_whole_units_are_drawn():
    """Ten equal examples of one unit tell what one of them tells: drawn one by one they would seem to tell more."""
    generator = np.random.default_rng(6)
    by_unit, by_example, runs = 0, 0, 80
    for run in range(runs):
        scores = mean_of(np.repeat(generator.random(60) < 0.5, 10))
        low, high = scores.intervals(seed=run, units=np.repeat(np.arange(60), 10).tolist(), resamples=200)["mean"]
        by_unit += low <= 0.5 <= high
        low, high = scores.intervals(seed=run, resamples=200)["mean"]
        by_example += low <= 0.5 <= high
    assert by_unit >= 0.88 * runs
    assert by_example <= 0.65 * runs


def test_units_may_lie_anywhere_and_be_of_different_sizes():
    drawn = []
    scores = Scores(5, lambda indices: drawn.append(sorted(indices.tolist())) or {"count": float(len(indices))})
    scores.intervals(seed=0, units=["b", "a", "b", "c", "a"], resamples=50)
    for indices in drawn[1:]:
        counts = [indices.count(number) for number in range(5)]
        assert counts[0] == counts[2]
        assert counts[1] == counts[4]
        assert counts[0] + counts[1] + counts[3] == 3


def test_the_same_seed_gives_the_same_interval():
    scores = mean_of(np.arange(20))
    assert scores.intervals(seed=1) == scores.intervals(seed=1)
    assert scores.intervals(seed=1) != scores.intervals(seed=2)


def test_draws_without_a_figure_are_left_out():
    rare = np.array([1.0] + [math.nan] * 9)

    def figures(drawn):
        there = rare[drawn][~np.isnan(rare[drawn])]
        return {"rare": float(there.mean()) if there.size else math.nan, "never": math.nan}

    intervals = Scores(10, figures).intervals(seed=0, resamples=100)
    assert intervals["rare"] == (1.0, 1.0)
    assert all(math.isnan(end) for end in intervals["never"])


@pytest.mark.parametrize("units", [["a", "b"], ["a", "b", "c", "d"], []])
def test_each_example_has_a_unit(units):
    with pytest.raises(InputError, match="units for 3 examples; give one for each"):
        mean_of([1, 2, 3]).intervals(seed=0, units=units)


def test_one_unit_has_no_interval():
    with pytest.raises(InputError, match="give at least two"):
        mean_of([1, 2, 3]).intervals(seed=0, units=["a", "a", "a"])
