"""SQuAD's normalisation by cases, F1 from words that are known; languages without articles, or without blanks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import InputError
from trainer.metrics.question_answering import exact_match, scores, token_f1

# a piece of an answer, and what the official script leaves of it
PIECES = {
    "The": [],
    "an": [],
    "a": [],
    ",": [],
    "\t": [],
    "cat": ["cat"],
    "Cat's": ["cats"],
    "U.S.": ["us"],
    "a-b": ["ab"],
    "É": ["é"],
    "\u2013": ["\u2013"],
    "theatre.": ["theatre"],
}
answers = st.lists(st.sampled_from(sorted(PIECES)), max_size=6)


def left_of(answer):
    return [word for piece in answer for word in PIECES[piece]]


@pytest.mark.parametrize(
    ("prediction", "reference", "equal"),
    [
        ("the Denver Broncos!", "Denver  Broncos", True),
        ("A cat", "the cat", True),
        ("U.S.", "us", True),
        ("a theatre", "theatre", True),
        ("another", "other", False),
        ("1,000", "1000", True),
        ("it\u2019s", "its", False),  # only ASCII's punctuation is removed
        ("cat the", "cat", True),
        ("cafe", "café", False),
    ],
)
def test_normalisation_as_in_the_official_script(prediction, reference, equal):
    assert exact_match(prediction, [reference]) == equal


def test_f1_by_hand():
    """Of four words (articles don't count) three are among the reference's five."""
    assert token_f1("in the Old City of Bern", ["the old city of Bern, Switzerland, Europe"]) == pytest.approx(
        2 * 4 / 11
    )
    assert token_f1("cat cat", ["cat"]) == pytest.approx(2 / 3)
    assert token_f1("dog", ["cat"]) == 0


def test_the_nearest_reference_counts_for_each_figure_by_itself():
    figures = scores(["Santa Clara", "blue"], [["Santa Clara, California", "Levi's Stadium"], ["red", "Blue."]])
    assert dict(figures) == pytest.approx({"exact_match": 0.5, "f1": (0.8 + 1) / 2})


@given(answers, answers)
def test_english_is_compared_by_what_the_official_script_leaves(prediction, reference):
    guess, truth = left_of(prediction), left_of(reference)
    assert exact_match(" ".join(prediction), [" ".join(reference)]) == (guess == truth)
    common = sum(min(guess.count(word), truth.count(word)) for word in set(guess))
    if common:
        precision, recall = common / len(guess), common / len(truth)
        expected = 2 * precision * recall / (precision + recall)
    else:
        expected = float(guess == truth)
    assert token_f1(" ".join(prediction), [" ".join(reference)]) == pytest.approx(expected)


def test_chinese_is_compared_by_character():
    assert token_f1("北京大学", ["北京"], "zh") == pytest.approx(2 * 2 / 6)
    assert token_f1("2014年5月。", ["2014 年"], "zh") == pytest.approx(2 * 2 / 6)
    assert exact_match("《红楼梦》", ["红楼 梦"], "zh-CN") == 1
    assert token_f1("北京大学", ["北京"], "en") == 0


@pytest.mark.parametrize(
    ("language", "prediction", "reference", "f1"),
    [
        ("de", "an der Spree", "Spree", 2 / 3),  # "der" is an article there, and "an" is none
        ("es", "¿a Madrid?", "a Madrid", 1),
        ("hi", "नई दिल्ली।", "नई दिल्ली", 1),
        ("hi", "दिल्ली", "दिल्ल", 0),  # a vowel sign is part of its word
        ("es", "la «Alhambra»", "Alhambra", 1),
        ("vi", "những con mèo", "con mèo", 1),
        ("ar", "في القاهرة؟", "القاهرة", 2 / 3),
        ("ar", "القاهرة", "قاهرة", 1),
        ("fr", "la Seine", "Seine", 2 / 3),  # MLQA has no French
        ("ru", "Москва", "москва", 1),
        ("ja", "富士山です", "富士山", 0.75),
        ("th", "กรุงเทพ", "กรุง เทพ", 1),
    ],
)
def test_other_languages(language, prediction, reference, f1):
    assert token_f1(prediction, [reference], language) == pytest.approx(f1)


def test_an_answer_of_articles_alone_equals_itself():
    assert dict(scores(["The", ""], [["the"], ["cat"]])) == {"exact_match": 0.5, "f1": 0.5}


@pytest.mark.parametrize(
    ("predictions", "references", "language", "message"),
    [
        (["a"], [], "en", "1 predictions for 0 references"),
        ([], [], "en", "at least one"),
        (["a", "b"], [["a"], "b"], "en", r"references\[1\] is a text"),
        (["a"], [[]], "en", r"references\[0\] is empty"),
        (["a"], [["a"]], "chinese", "ISO 639"),
        (["a"], [["a"]], "", "ISO 639"),
    ],
)
def test_what_does_not_fit_is_refused(predictions, references, language, message):
    with pytest.raises(InputError, match=message):
        scores(predictions, references, language)
