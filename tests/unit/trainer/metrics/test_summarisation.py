"""ROUGE on the example of rouge-score's README; in languages whose letters its own tokenizer drops."""

import pytest
from rouge_score.rouge_scorer import RougeScorer

from configs.errors import InputError
from trainer.metrics.summarisation import scores

GUESS, TRUTH = "The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog"


def test_the_documented_example():
    """6 words, 2 pairs and a sequence of 5 words in common, of 8 and 9 words."""
    figures = scores([GUESS], [[TRUTH]])
    assert dict(figures) == pytest.approx({"rouge1": 2 * 6 / 17, "rouge2": 2 * 2 / 15, "rougeL": 2 * 5 / 17})


def test_english_words_are_stemmed():
    assert scores(["the dogs jumped"], [["the dog jumps"]])["rouge1"] == 1
    assert scores(["die Hunde"], [["die Hund"]], "de")["rouge1"] == pytest.approx(0.5)


def test_the_nearest_reference_counts():
    figures = scores([GUESS, "nothing"], [["unlike", TRUTH], ["all"]])
    assert figures["rougeL"] == pytest.approx(5 / 17)


@pytest.mark.parametrize(
    ("language", "prediction", "reference", "expected"),
    [
        ("de", "Über die Brücke", "über die brücke.", (1, 1, 1)),
        ("de", "für", "f r", (0, 0, 0)),
        ("zh", "今天天气好", "今天天气很好", (10 / 11, 6 / 9, 10 / 11)),
        ("hi", "दिल्ली भारत की राजधानी है", "राजधानी दिल्ली है", (6 / 8, 0, 4 / 8)),
        ("ar", "القاهرة عاصمة مصر", "عاصمة مصر القاهرة", (1, 1 / 2, 2 / 3)),
    ],
)
def test_other_languages_by_hand(language, prediction, reference, expected):
    figures = scores([prediction], [[reference]], language)
    assert tuple(figures.values()) == pytest.approx(expected)


@pytest.mark.parametrize("use_stemmer", [True, False])
def test_for_english_it_is_the_librarys_own_score(use_stemmer):
    library = RougeScorer(["rougeL"], use_stemmer=use_stemmer).score("The dogs ran.", "A dog ran.")
    assert library["rougeL"].fmeasure == pytest.approx(2 / 3 if use_stemmer else 1 / 3)
    assert scores(["A dog ran."], [["The dogs ran."]])["rougeL"] == pytest.approx(2 / 3)


def test_an_empty_summary_is_worth_nothing():
    assert set(scores([""], [[TRUTH]]).values()) == {0}


@pytest.mark.parametrize(
    ("predictions", "references", "language", "message"),
    [
        (["a", "b"], [["a"]], "en", "2 predictions for 1 references"),
        ([], [], "en", "at least one"),
        (["a"], ["a"], "en", r"references\[0\] is a text"),
        (["a"], [[]], "en", r"references\[0\] is empty"),
        (["a"], [["a"]], "e", "ISO 639"),
    ],
)
def test_what_does_not_fit_is_refused(predictions, references, language, message):
    with pytest.raises(InputError, match=message):
        scores(predictions, references, language)
