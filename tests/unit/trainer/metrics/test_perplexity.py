"""Perplexity of guessing among equals is their number; a model that has diverged has no figure."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import InputError
from trainer.metrics.perplexity import scores


@given(st.integers(2, 1000), st.lists(st.integers(1, 500), min_size=1, max_size=9))
def test_whoever_guesses_among_equals_is_as_perplexed_as_there_are(choices, tokens):
    figures = scores([math.log(choices) * count for count in tokens], tokens, [4 * count for count in tokens])
    assert figures["perplexity"] == pytest.approx(choices)
    assert figures["bits_per_char"] == pytest.approx(math.log2(choices) / 4)


def test_long_records_count_for_more():
    """2 nats on 1 token and 1 nat on 9: 0.3 nats a token."""
    assert scores([2, 1], [1, 9], [3, 27])["perplexity"] == pytest.approx(math.exp(0.3))


def test_certainty_is_a_perplexity_of_one():
    assert dict(scores([0.0], [5], [9])) == {"perplexity": 1, "bits_per_char": 0}


@pytest.mark.parametrize("nats", [math.nan, math.inf])
def test_a_model_that_has_diverged_has_no_figure(nats):
    assert all(math.isnan(value) for value in scores([1.0, nats], [5, 5], [9, 9]).values())


def test_a_perplexity_that_no_number_holds_is_none():
    figures = scores([1e6], [1], [1])
    assert math.isnan(figures["perplexity"])
    assert figures["bits_per_char"] == pytest.approx(1e6 / math.log(2))


@pytest.mark.parametrize(
    ("nats", "tokens", "characters", "message"),
    [
        ([1.0], [1, 2], [1, 2], "1 nats, 2 tokens and 2 characters"),
        ([1.0], [1], [1, 2], "1 nats, 1 tokens and 2 characters"),
        ([], [], [], "at least one"),
        ([1.0, 1.0], [1, 0], [1, 1], "no token"),
        ([1.0, 1.0], [1, 1], [0, 1], "no character"),
    ],
)
def test_what_does_not_fit_is_refused(nats, tokens, characters, message):
    with pytest.raises(InputError, match=message):
        scores(nats, tokens, characters)
