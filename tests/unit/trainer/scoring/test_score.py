"""Scores of no record, of one, and of equal ones; sums that have no figure say so."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema.tasks import CAUSAL
from federated.simulation.in_the_clear import summary
from trainer.scoring.score import Score
from trainer.tasks.text import CausalTask

records = st.tuples(st.floats(0, 1e6), st.integers(1, 1000))
silos = st.dictionaries(st.sampled_from(["north", "south", "tiny"]), st.lists(records, max_size=4), min_size=1)


MEASURES = CausalTask.measured(CAUSAL, 64)


def one(nats, characters):
    return Score(MEASURES, np.array([[nats, characters, 0.0, 0.0]]))


def scored(units):
    return sum((one(*unit) for unit in units), Score(MEASURES, np.zeros((0, 4))))


@given(silos)
def test_a_figure_is_that_of_all_records_or_not_available(units):
    found = summary({name: scored(mine) for name, mine in units.items()})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for name, mine in {**units, None: [unit for some in units.values() for unit in some]}.items():
        figure = found["by_silo"][name] if name else found
        assert figure["records"] == len(mine)
        if not mine:
            assert figure["bits_per_char"] is None
        else:
            expected = sum(nats for nats, _ in mine) / sum(characters for _, characters in mine) / math.log(2)
            assert figure["bits_per_char"] == pytest.approx(expected)


@given(records, st.integers(1, 9))
def test_equal_records_have_the_figure_of_one(unit, count):
    assert scored([unit] * count).main == pytest.approx(scored([unit]).main)


@pytest.mark.parametrize("nats", [math.nan, math.inf, -math.inf])
def test_a_model_that_has_diverged_has_no_figure(nats):
    assert (one(1.0, 5) + one(nats, 5)).main is None
