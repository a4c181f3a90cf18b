"""The sum of clients' updates and its noise, against plain loops and the plan's numbers."""

import math

import numpy as np
import pytest

from privacy.mechanism.client_sum import ClippedSum, clipped
from privacy.mechanism.noise import grid
from privacy.mechanism.streams import Streams
from privacy.plan import PlanTerms

C, SIGMA, CLIENTS = 0.8, 1.5, 5
PLAN = PlanTerms(
    unit="client",
    relation="zero_out",
    sampler="all",
    sampling_rate=1,
    max_grad_norm=C,
    noise_multiplier=SIGMA,
    rounds=3,
    steps_per_round=1,
    delta=1e-5,
    num_clients=CLIENTS,
).for_clients()
SHAPES = {"a": (40, 50), "b": (7, 500)}
TEMPLATE = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
STREAMS = Streams(b"s" * 32, "ab" * 32)


def update(seed, norm):
    rng = np.random.default_rng(seed)
    drawn = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    scale = norm / math.sqrt(sum((array**2).sum() for array in drawn.values()))
    return {name: (array * scale).astype(np.float32) for name, array in drawn.items()}


def norm_of(arrays):
    return math.sqrt(sum(float((array.astype(np.float64) ** 2).sum()) for array in arrays.values()))


def mean_of(updates, streams=STREAMS, plan=PLAN):
    total = ClippedSum(TEMPLATE, plan)
    for number, one in enumerate(updates):
        total.add(f"client {number}", one)
    return total.noised_mean(streams)


def by_hand(updates):
    """Clip each, add, divide by the constant: a loop in float64."""
    total = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for one in updates:
        factor = min(1.0, C / norm_of(one))
        for name in total:
            total[name] += one[name].astype(np.float64) * factor
    return {name: array / CLIENTS for name, array in total.items()}


NORMS = (0.1, 0.8, 3.0, 40.0, 0.5)


@pytest.mark.parametrize("answering", [5, 3])
def test_without_its_noise_the_mean_is_that_of_a_plain_loop(answering, monkeypatch):
    """The divisor is the plan's constant, whoever answers."""
    updates = [update(seed, norm) for seed, norm in enumerate(NORMS)][:answering]
    monkeypatch.setattr("privacy.mechanism.noise.standard_normal", lambda _, size: np.zeros(size))
    found, expected = mean_of(updates), by_hand(updates)
    for name in SHAPES:
        np.testing.assert_allclose(found[name], expected[name], atol=grid(SIGMA * C) / CLIENTS + 1e-8)
    backwards = mean_of(updates[::-1])
    assert all((found[name] == backwards[name]).all() for name in SHAPES)


@pytest.mark.parametrize("answering", [5, 3, 0])
def test_the_noise_on_the_sum_is_sigma_c_whoever_answers(answering):
    """Pooled over 220,000 coordinates the deviation is known to 0.15%; its share of 1% is six of these."""
    updates = [update(seed, norm) for seed, norm in enumerate(NORMS)][:answering]
    expected, residuals = by_hand(updates), []
    for draw in range(40):
        found = mean_of(updates, Streams(bytes([draw]) * 32, "cd" * 32))
        residuals += [(found[name] - expected[name]).ravel() for name in SHAPES]
    pooled = np.concatenate(residuals) * CLIENTS
    assert len(pooled) == 40 * 5500
    assert pooled.std() == pytest.approx(SIGMA * C, rel=0.01)
    assert abs(pooled.mean()) < 5 * SIGMA * C / math.sqrt(len(pooled))
    assert abs(np.corrcoef(pooled[:5500], pooled[5500:11000])[0, 1]) < 5 / math.sqrt(5500)


@pytest.mark.parametrize("norm", [1000 * C, 1e30])
def test_a_client_that_ignores_the_norm_moves_the_mean_by_c_over_n(norm):
    """The same noise with it and without it, so that their difference is its share, up to the grid of the noise."""
    others = [update(seed, 0.5) for seed in range(CLIENTS - 1)]
    with_it, without = mean_of([*others, update(99, norm)]), mean_of(others)
    moved = norm_of({name: with_it[name].astype(np.float64) - without[name] for name in SHAPES})
    values = sum(array.size for array in TEMPLATE.values())
    rounding = math.sqrt(values) * (grid(SIGMA * C) / CLIENTS + np.abs(with_it["a"]).max() * 2.0**-23)
    assert C / CLIENTS * 0.99 < moved < C / CLIENTS + rounding


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_counts_as_a_client_that_sends_nothing(bad):
    """To refuse it would show in who has answered, and that must not depend on a client's data."""
    broken = update(1, 0.5)
    broken["a"][3, 4] = bad
    total = ClippedSum(TEMPLATE, PLAN)
    total.add("north", broken)
    assert total.count == 1
    assert all((array == mean_of([])[name]).all() for name, array in total.noised_mean(STREAMS).items())


def test_neither_clipping_nor_rounding_leaves_a_vector_longer_than_c():
    for seed in range(200):
        one = update(seed, 10.0 ** np.random.default_rng(seed).uniform(-3, 8))
        short = clipped(one, C)
        assert norm_of(short) <= C
        total = ClippedSum(TEMPLATE, PLAN)
        total.add("north", one)
        assert norm_of({name: parts * total._part for name, parts in total._totals.items()}) <= C
    exact = update(7, C / 2)
    np.testing.assert_array_equal(clipped(exact, C)["a"], exact["a"])  # what is short enough is left as it is


def test_other_shapes_second_updates_and_more_clients_than_the_plan_are_refused():
    total = ClippedSum(TEMPLATE, PLAN)
    with pytest.raises(ValueError, match="not the adapter's"):
        total.add("north", {"a": TEMPLATE["a"]})
    for seed in range(CLIENTS):
        total.add(f"client {seed}", update(seed, 1.0))
    with pytest.raises(ValueError, match="sent an update of this round before"):
        total.add("client 0", update(9, 1.0))  # twice would be 2 C
    with pytest.raises(ValueError, match="more than the plan's 5 clients"):
        total.add("client 9", update(9, 1.0))
    assert total.count == CLIENTS
