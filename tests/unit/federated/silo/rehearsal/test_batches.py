"""How many passes a batch takes: the arithmetic against batches that are drawn, and cut by the trainer's own code."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from federated.silo.rehearsal.batches import batch_seconds, expected_parts, parts
from privacy.clipping.independence import Together

SIZES = (1, 2, 4, 8, 16)


def proven(micro_batch_size):
    """What cuts batches, where every size holds."""
    clipper = SimpleNamespace(parameters={"a": torch.zeros(1)}, model=torch.nn.Linear(1, 1), source=None)
    together = Together(clipper, None, lambda unit: unit, None, micro_batch_size)
    together._same_bits = lambda *_: True
    return together


@pytest.mark.parametrize("micro_batch_size", [16, 5, 1])
@pytest.mark.parametrize("records", [0, 1, 7, 16, 37])
def test_records_are_cut_as_the_trainer_cuts_them(records, micro_batch_size):
    together = proven(micro_batch_size)
    sizes = list(together.sizes(3))
    assert sizes == [size for size in SIZES if size <= micro_batch_size]
    cut = Counter(len(part) for part in together.cut([3] * records))
    assert cut == +parts(records, sizes)


@pytest.mark.parametrize("expected", [0.3, 17.0, 400.0])
def test_a_steps_parts_are_those_of_drawn_batches(expected):
    drawn = np.random.default_rng(0).poisson(expected, size=20_000)
    counted = sum((parts(int(number), SIZES) for number in drawn), Counter())
    for size, number in expected_parts(expected, SIZES).items():
        assert number == pytest.approx(counted[size] / len(drawn), abs=0.03), size


def test_passes_that_take_the_same_for_each_record_make_a_batch_of_its_records():
    """However they are cut: so many records, each a second for a hundred of its tokens."""
    tokens = [16, 32, 48, 64]
    passes = {length: {size: size * length / 100 for size in SIZES} for length in (16, 48, 64)}
    step_s, proofs_s = batch_seconds(65.0, tokens, passes, steps=10**6)
    assert step_s == pytest.approx(65 * 0.4)
    # Each of four lengths and four sizes is proven once: twice its records together, and each alone.
    assert proofs_s == pytest.approx(2 * sum(2 * size * length / 100 for size in SIZES[1:] for length in tokens))


def test_passes_that_take_the_same_for_any_number_are_counted():
    """The small model: 64 records of one length are four passes or some more, of 16 lengths many."""
    passes = {length: dict.fromkeys(SIZES, 0.02) for length in (16, 256)}
    one, _ = batch_seconds(64.0, [256], passes, steps=1)
    many, _ = batch_seconds(64.0, list(range(16, 257, 16)), passes, steps=1)
    drawn = np.random.default_rng(0).poisson(4.0, size=(20_000, 16))
    counted = np.mean([sum(parts(int(n), SIZES).total() for n in row) for row in drawn[:2000]])
    assert many == pytest.approx(0.02 * counted, rel=0.03)
    assert 4 * 0.02 < one < 0.5 * many


def test_what_never_occurs_is_not_proven():
    passes = {16: dict.fromkeys(SIZES, 1.0)}
    _, proofs_s = batch_seconds(0.01, [16], passes, steps=1)
    assert proofs_s < 0.001
