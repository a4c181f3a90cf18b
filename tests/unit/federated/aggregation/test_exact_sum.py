import itertools
from fractions import Fraction

import numpy as np
import pytest

from federated.adapters.arrays import from_bytes, to_bytes
from federated.aggregation import exact_sum
from federated.aggregation.exact_sum import FixedPointSum


def update(seed):
    rng = np.random.default_rng(seed)
    return {"a": rng.normal(size=(3, 4)).astype(np.float32), "b": rng.normal(scale=1e-4, size=5).astype(np.float32)}


def test_the_sum_does_not_depend_on_the_order_of_replies():
    updates = [update(seed) for seed in range(5)]
    means = set()
    for order in itertools.permutations(updates):
        total = FixedPointSum(updates[0])
        for one in order:
            total.add(one)
        means.add(to_bytes(total.mean()))
    assert len(means) == 1
    plain = {name: np.mean([one[name] for one in updates], axis=0) for name in updates[0]}
    for name, array in from_bytes(means.pop()).items():
        np.testing.assert_allclose(array, plain[name], rtol=1e-5, atol=1e-9)


def test_it_does_not_matter_how_many_values_are_added_at_once(monkeypatch):
    def mean(block):
        monkeypatch.setattr(exact_sum, "_BLOCK", block)
        total = FixedPointSum({**update(0), "c": np.zeros((2, 0, 3), np.float32)})
        for seed in range(3):
            total.add({"c": np.zeros((2, 0, 3), np.float32), **update(seed)})
        return total.mean()

    whole = mean(2**18)
    assert {name: array.shape for name, array in whole.items()} == {"a": (3, 4), "b": (5,), "c": (2, 0, 3)}
    assert to_bytes(mean(1)) == to_bytes(mean(12)) == to_bytes(whole)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 40_000.0])
def test_a_bad_update_is_refused_and_leaves_no_part_behind(value):
    good, bad = update(0), update(1)
    bad["b"][2] = value
    total = FixedPointSum(good)
    total.add(good)
    with pytest.raises(ValueError, match="not finite or not below"):
        total.add(bad)
    with pytest.raises(ValueError, match="names or shapes"):
        total.add({"a": good["a"]})
    assert total.count == 1
    for name, array in total.mean().items():
        np.testing.assert_allclose(array, good[name], atol=2**-31)


def test_weighted_updates_add_up_exactly_in_any_order():
    """Beside whole fractions: each value is rounded once, on its way in, and nothing after it."""
    draws = np.random.default_rng(5)
    updates = [{"a": draws.normal(size=7).astype(np.float32)} for _ in range(6)]
    weights = [(1 + staleness) ** -0.5 for staleness in range(6)]
    found = []
    for order in (range(6), reversed(range(6)), (3, 0, 5, 1, 4, 2)):
        total = FixedPointSum({"a": np.zeros(7, np.float32)})
        for at in order:
            total.add(updates[at], weights[at])
        found.append(total.mean()["a"].tobytes())
    assert len(set(found)) == 1
    columns = np.stack([one["a"] for one in updates], axis=1)
    for value, column in zip(np.frombuffer(found[0], np.float32), columns, strict=True):
        exact = sum(Fraction(float(one)) * Fraction(weight) for one, weight in zip(column, weights, strict=True)) / 6
        assert abs(Fraction(float(value)) - exact) <= Fraction(1, 2**33) + abs(exact) / 2**24
