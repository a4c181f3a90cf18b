"""Private evaluation of entities and answers: no unit moves the vector by more than the sensitivity."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_bert import CONTEXT, word_pieces

from configs.schema.tasks import TaskSpec
from federated.evaluation.private_sums import bounds_of, figures, private_sums
from privacy.mechanism.streams import Streams
from trainer.tasks.fields import Answers
from trainer.tasks.task import kind_of

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG")
ENTITIES, QA = TaskSpec(name="entities", labels=TAGS), TaskSpec(name="qa")
TOKENIZER = word_pieces(["a b c d e f g h in the house of a friend"] * 2, 60)
LETTERS = ["a", "b", "c", "d", "in", "the", "house"]
BASE = SimpleNamespace(metadata={"context_length": CONTEXT})


class Anything:
    """A model that says anything, also what is no number: the same for the same tokens."""

    config = SimpleNamespace(type_vocab_size=2)

    def __init__(self, seed, size):
        self.seed, self.size = seed, size

    def __call__(self, input_ids, attention_mask, token_type_ids=None):
        generator = torch.Generator().manual_seed(self.seed + int(input_ids.sum()))
        logits = torch.randn((*input_ids.shape, self.size), generator=generator)
        if self.seed % 3 == 0:
            logits[:, ::2] = (float("nan"), float("inf"), -float("inf"))[self.seed // 3 % 3]
        return SimpleNamespace(logits=logits, start_logits=logits[..., 0], end_logits=logits[..., 1])


def sums(model, task, units, bounds):
    return np.array(private_sums(model, task, units, [], bounds, 1e-12, Streams(bytes(32), "ab" * 32)))


tagged = st.lists(st.tuples(st.sampled_from(LETTERS), st.integers(0, len(TAGS) - 1)), min_size=1, max_size=30)
entity_rows = st.lists(tagged, min_size=1, max_size=4)


@given(entity_rows, st.integers(0, 100))
def test_no_units_entities_move_the_sums_too_far(rows, seed):
    task, bounds = kind_of("entities")(TOKENIZER, CONTEXT, ENTITIES), bounds_of(BASE, ENTITIES, ())
    unit = task.scored([{"tokens": [w for w, _ in row], "tags": [t for _, t in row]} for row in rows])
    moved = sums(Anything(seed, len(TAGS)), task, [unit], bounds)
    assert (moved >= -1e-9).all()
    assert (moved[:2] <= 1 + 1e-9).all()
    assert np.linalg.norm(moved[2:]) <= bounds.measures.counts_norm + 1e-9
    assert np.linalg.norm(moved) <= bounds.sensitivity + 1e-9


def test_an_example_of_many_entities_is_shortened_and_keeps_its_proportions():
    """30 entities of one kind, all found: without the cap it would move the sums by 30."""
    task, bounds = kind_of("entities")(TOKENIZER, CONTEXT, ENTITIES), bounds_of(BASE, ENTITIES, ())
    (example,) = task.scored([{"tokens": ["a"] * 30, "tags": [1] * 20 + [3] * 10}])

    class Half:
        def __call__(self, input_ids, attention_mask):
            logits = torch.zeros(*input_ids.shape, len(TAGS))
            logits[..., 1] = 1.0
            return SimpleNamespace(logits=logits)

    assert task.record_scores(Half(), [example])[0, 2:].tolist() == [20, 0, 0, 10, 0, 0, 0, 10, 0]
    moved = sums(Half(), task, [[example]], bounds)[2:]
    assert np.linalg.norm(moved) == pytest.approx(bounds.measures.counts_norm)
    assert moved[3] / moved[0] == pytest.approx(0.5, rel=1e-4)
    found = figures([sums(Half(), task, [[example]], bounds).tolist()], bounds, 0.0)
    assert found["entity_f1"] == pytest.approx(2 * 20 / (2 * 20 + 10 + 10), rel=1e-4)
    assert found["accuracy"] == pytest.approx(2 / 3, rel=1e-4)


words = st.lists(st.sampled_from(LETTERS), min_size=1, max_size=50)


@given(st.lists(st.tuples(words, words, st.integers(0, 49)), min_size=1, max_size=3), st.integers(0, 100))
def test_no_units_answers_move_the_sums_too_far(rows, seed):
    task, bounds = kind_of("qa")(TOKENIZER, CONTEXT, QA), bounds_of(BASE, QA, ())
    made = [
        {
            "context": " ".join(context),
            "question": " ".join(asked),
            "answer": Answers((context[at % len(context)],), (-1,)),
        }
        for context, asked, at in rows
    ]
    moved = sums(Anything(seed, 2), task, [task.scored(made)], bounds)
    assert ((moved >= -1e-9) & (moved <= 1 + 1e-9)).all()
    assert np.linalg.norm(moved) <= bounds.sensitivity + 1e-9
    assert moved[2] == pytest.approx(1.0)  # one unit, however many questions and windows


def test_the_error_of_a_figure_over_all_types_is_that_of_repeated_noise():
    bounds = bounds_of(BASE, ENTITIES, ())
    exact, rng, noise = np.array([10.0, 12.0, *[300.0] * 3, *[80.0] * 3, *[90.0] * 3]), np.random.default_rng(0), 2.0
    drawn = [figures([exact + rng.normal(0, noise * bounds.sensitivity, 11)], bounds, noise) for _ in range(2000)]
    spread = np.std([one["entity_f1"] for one in drawn])
    assert spread == pytest.approx(np.median([one["entity_f1_error"] for one in drawn]), rel=0.1)
