"""BLEU and chrF on the example of sacrebleu's README, of Chinese by hand, and in draws as sacrebleu computes them."""

import math

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from configs.errors import InputError
from trainer.metrics.translation import scores

# the example of sacrebleu's README, where the references stand in two streams
GUESS = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
TRUTH = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]


def test_the_documented_example():
    figures = scores(GUESS, TRUTH)
    assert round(figures["bleu"], 4) == 0.4853
    assert round(figures["chrf"], 4) == 0.5973


def test_examples_may_have_different_numbers_of_references():
    ragged = [TRUTH[0], TRUTH[1][:1], TRUTH[2]]
    streams = [[mine[0] for mine in ragged], [TRUTH[0][1], None, TRUTH[2][1]]]
    figures = scores(GUESS, ragged)
    assert figures["bleu"] == pytest.approx(BLEU().corpus_score(GUESS, streams).score / 100)
    assert figures["chrf"] == pytest.approx(CHRF().corpus_score(GUESS, streams).score / 100)


def test_a_draw_is_the_corpus_of_the_texts_that_were_drawn():
    figures = scores(GUESS, TRUTH)
    drawn = np.array([2, 0, 2])
    expected = BLEU().corpus_score(
        [GUESS[number] for number in drawn], [[TRUTH[number][stream] for number in drawn] for stream in (0, 1)]
    )
    assert figures._figures(drawn)["bleu"] == pytest.approx(expected.score / 100)


def test_chinese_is_divided_into_characters():
    """5 of 5 characters, 3 of 4 pairs, 2 of 3 triples, 1 of 2 fours; 5 characters where 6 are wanted."""
    guess, truth = ["今天天气好"], [["今天天气很好"]]
    by_hand = math.exp(1 - 6 / 5) * (1 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)
    for language in ("zh", "zh-Hant", "ZH"):
        assert scores(guess, truth, language)["bleu"] == pytest.approx(by_hand)
    assert scores(guess, truth, "en")["bleu"] == 0
    assert scores(guess, truth, "en", tokenizer="char")["bleu"] == pytest.approx(by_hand)


def test_no_four_tokens_have_no_bleu():
    figures = scores(["Guten Tag"], [["Guten Tag"]], "de")
    assert figures["bleu"] == 0
    assert figures["chrf"] == pytest.approx(1)


def test_an_empty_translation_is_worth_nothing():
    assert dict(scores(["", ""], [["a b c d"], ["e f g h"]])) == {"bleu": 0, "chrf": 0}


@pytest.mark.parametrize(
    ("predictions", "references", "options", "message"),
    [
        (["a"], [], {}, "1 predictions for 0 references"),
        ([], [], {}, "at least one"),
        (["a"], ["a"], {}, r"references\[0\] is a text"),
        (["a"], [[]], {}, r"references\[0\] is empty"),
        (["a"], [["a"]], {"tokenizer": "flores200"}, "'flores200': give one of 13a, zh"),
        (["a"], [["a"]], {"language": "german"}, "ISO 639"),
    ],
)
def test_what_does_not_fit_is_refused(predictions, references, options, message):
    with pytest.raises(InputError, match=message):
        scores(predictions, references, **options)
