"""The ring: colluders can't cut it where it says so, by trying all; its chances, by counting all."""

import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import InputError
from privacy.secagg.graph import LARGEST_FAILURE, Ring, failure_chance, reach_needed


def connected(ring, there):
    reached, todo = set(), [min(there)] if there else []
    while todo:
        name = todo.pop()
        reached.add(name)
        todo += [other for other in ring.neighbourhood(name) if other in there and other not in reached]
    return reached == set(there)


@settings(max_examples=60)
@given(st.integers(5, 10), st.integers(1, 3), st.integers(0, 2), st.data())
def test_where_the_ring_holds_no_colluders_cut_the_honest_apart(silos, reach, colluders, data):
    names = tuple(map(chr, range(97, 97 + silos)))
    ring = Ring(names, min(reach, (silos - 1) // 2), colluders)
    left = data.draw(st.sets(st.sampled_from(names), min_size=colluders + 1))
    if not ring.cuts(left):
        for corrupt in itertools.combinations(sorted(left), colluders):
            assert connected(ring, left - set(corrupt))


@given(st.integers(5, 60), st.integers(1, 8))
def test_neighbours_are_mutual_and_each_has_as_many(silos, reach):
    names = tuple(map(str, range(silos)))
    ring = Ring(names, min(reach, (silos - 1) // 2), 0)
    around = {name: ring.neighbourhood(name) for name in names}
    assert all(len(set(some)) == 2 * ring.reach + 1 for some in around.values())
    assert all(name in around[other] for name, some in around.items() for other in some)


@pytest.mark.parametrize(("silos", "colluders", "left", "reach"), [(9, 1, 7, 2), (10, 0, 7, 3), (11, 2, 9, 4)])
def test_the_bound_is_at_least_the_share_of_failures_among_all_choices(silos, colluders, left, reach):
    names = tuple(map(str, range(silos)))
    ring = Ring(names, reach, colluders)

    def fails(there):
        few = any(sum(name in there for name in ring.neighbourhood(owner)) < ring.threshold for owner in names)
        return few or ring.cuts(there)

    choices = [fails(set(there)) for there in itertools.combinations(names, left)]
    exact = Fraction(sum(choices), len(choices))
    assert exact <= failure_chance(silos, colluders, left, reach)


def test_few_silos_take_all_with_all_and_many_a_ring_that_seldom_fails():
    assert reach_needed(10, 2, 7) is None
    reach = reach_needed(1000, 5, 900)
    assert 2 * reach + 1 < 120
    assert failure_chance(1000, 5, 900, reach) <= LARGEST_FAILURE < failure_chance(1000, 5, 900, reach - 1)


def test_a_large_federation_for_which_no_ring_will_do_is_refused():
    with pytest.raises(InputError, match="fewer colluders"):
        reach_needed(300, 140, 225)


def test_no_threshold_is_within_the_colluders_reach():
    for silos, colluders in ((3, 1), (5, 3), (20, 9)):
        assert Ring(tuple(map(str, range(silos))), None, colluders).threshold > colluders
