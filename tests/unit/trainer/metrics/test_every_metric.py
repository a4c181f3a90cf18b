"""What holds for the measures of all tasks: what is right is 1, order is nothing, libraries stay offline."""

import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import InputError
from trainer.metrics import classification, entities, question_answering, summarisation, translation

SENTENCES = [
    "the dog bit the man again",
    "it was not to be expected",
    "a man had just bitten the dog",
    "nobody was there to see it",
    "all of this is in the papers",
]


def of_texts(measure):
    return lambda guess, truth: measure(
        [SENTENCES[number] for number in guess], [[SENTENCES[number]] for number in truth]
    )


def of_tags(guess, truth):
    tags = (["B-A", "I-A"], ["B-A", "B-B"], ["O", "B-B"], ["B-B", "I-B"], ["B-A", "O"])
    return entities.scores([tags[number] for number in guess], [tags[number] for number in truth], ["A", "B"])


def of_classes(guess, truth):
    labels = list("abcde")
    confidences = [(number + 1) / 10 if number != right else 1.0 for number, right in zip(guess, truth, strict=True)]
    return classification.scores(
        [labels[number] for number in guess], [labels[number] for number in truth], labels, confidences
    )


def of_several_classes(guess, truth):
    sets = ({"a"}, {"a", "b"}, {"b"}, {"c"}, {"a", "c"})
    return classification.multilabel_scores(
        [sets[number] for number in guess], [sets[number] for number in truth], ["a", "b", "c"]
    )


MEASURES = {
    "classes": of_classes,
    "several": of_several_classes,
    "entities": of_tags,
    "answers": of_texts(question_answering.scores),
    "translations": of_texts(translation.scores),
    "summaries": of_texts(summarisation.scores),
}
anything = st.lists(st.integers(0, 4), min_size=1, max_size=8)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@settings(max_examples=15, deadline=None)
@given(truth=anything)
def test_what_is_right_is_one(measure, truth):
    for name, value in measure(truth, truth).items():
        if not math.isnan(value):  # a type of entity that does not occur has no figure
            assert value == pytest.approx(0 if name == "expected_calibration_error" else 1)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_order_is_nothing_and_every_figure_is_a_fraction(measure, data):
    pairs = data.draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8))
    figures = dict(measure(*zip(*pairs, strict=True)))
    assert all(-1e-9 <= value <= 1 + 1e-9 for value in figures.values() if not math.isnan(value))
    shuffled = data.draw(st.permutations(pairs))
    assert dict(measure(*zip(*shuffled, strict=True))) == pytest.approx(figures, nan_ok=True)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_an_interval_holds_the_figure_and_belongs_to_it(measure):
    guess, truth = [0, 1, 2, 3, 4, 0, 1, 3] * 3, [0, 1, 2, 3, 4, 1, 2, 4] * 3
    scores = measure(guess, truth)
    intervals = scores.intervals(seed=0, units=[number % 8 for number in range(24)], resamples=60)
    assert intervals.keys() == scores.keys()
    for name, (low, high) in intervals.items():
        if name != "expected_calibration_error":  # fewer examples in a bin only look worse calibrated
            assert low <= scores[name] <= high


@pytest.mark.parametrize(
    ("measure", "module"),
    [
        ("classes", "sklearn.metrics"),
        ("several", "sklearn.metrics"),
        ("entities", "seqeval.scheme"),
        ("translations", "sacrebleu.metrics"),
        ("summaries", "rouge_score.rouge_scorer"),
    ],
)
def test_a_library_that_is_missing_names_the_extra(monkeypatch, measure, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"is not installed.*siloweave\[tasks\]"):
        MEASURES[measure]([0], [0])


ALONE = """
import socket, sys

def refuse(*args, **options):
    raise AssertionError("a metric asks the network")

socket.socket.connect = socket.getaddrinfo = refuse
from trainer.metrics import classification, entities, question_answering, summarisation, translation
assert question_answering.scores(["a cat"], [["cat"]])["f1"] == 1
loaded = {name.partition(".")[0] for name in sys.modules} & {"sklearn", "seqeval", "sacrebleu", "rouge_score", "nltk"}
assert not loaded, loaded
from rouge_score.rouge_scorer import RougeScorer
for use_stemmer in (True, False):
    RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=use_stemmer).score("two dogs", "a dog")
for language in ("en", "de", "zh"):
    summarisation.scores(["two dogs"], [["a dog"]], language)
    for tokenizer in (None, "13a", "zh", "intl", "char", "none"):
        translation.scores(["two dogs"], [["a dog"]], language, tokenizer)
entities.scores([["B-A"]], [["B-A"]], ["A"])
classification.scores(["a"], ["a"], ["a"], [0.5])
"""


def test_libraries_are_loaded_when_needed_and_nothing_is_fetched(tmp_path):
    """With an empty home, where nltk would look for the data that it fetches."""
    environment = {"HOME": str(tmp_path), "PYTHONPATH": ":".join(path for path in sys.path if path)}
    ran = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert list(tmp_path.iterdir()) == []
