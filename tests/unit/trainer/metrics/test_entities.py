"""Entities on seqeval's own example, against its report, and what strict IOB2 refuses."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics import classification_report
from seqeval.scheme import IOB2

from configs.errors import InputError
from trainer.metrics.entities import scores

# the example of seqeval's README
TRUTH = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
GUESS = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]

anything = st.sampled_from(["O", "B-PER", "I-PER", "B-creative-work", "I-creative-work"])
pairs = st.lists(st.lists(st.tuples(anything, anything), max_size=8), min_size=1, max_size=6)


def valid(tags):
    """An I- that continues nothing becomes a B-."""
    made = []
    for tag in tags:
        continues = made and made[-1][2:] == tag[2:]
        made.append(f"B{tag[1:]}" if tag.startswith("I-") and not continues else tag)
    return made


def test_the_documented_example():
    assert dict(scores(GUESS, TRUTH, ["MISC", "PER"])) == {
        "precision": 0.5,
        "recall": 0.5,
        "f1": 0.5,
        "f1_MISC": 0.0,
        "f1_PER": 1.0,
    }


@given(pairs)
def test_figures_are_those_of_seqevals_strict_report(texts):
    guess, truth = [[tag for tag, _ in text] for text in texts], [valid([tag for _, tag in text]) for text in texts]
    figures = scores(guess, truth, ["PER", "creative-work"])
    if not any("B" in tag for tags in (*guess, *truth) for tag in tags):
        assert all(math.isnan(value) for value in figures.values())
        return
    report = classification_report(truth, guess, mode="strict", scheme=IOB2, output_dict=True, zero_division=0)
    for name, ours in (("precision", "precision"), ("recall", "recall"), ("f1-score", "f1")):
        assert figures[ours] == pytest.approx(report["micro avg"][name])
    for name in ("PER", "creative-work"):
        if name in report:
            assert figures[f"f1_{name}"] == pytest.approx(report[name]["f1-score"])
        else:
            assert math.isnan(figures[f"f1_{name}"])


def test_a_predicted_entity_needs_its_beginning():
    figures = scores([["I-PER", "I-PER"]], [["B-PER", "I-PER"]], ["PER"])
    assert (figures["precision"], figures["recall"], figures["f1"]) == (0, 0, 0)


def test_of_types_that_seldom_occur_there_is_an_interval():
    figures = scores(GUESS * 10, TRUTH * 10, ["MISC", "PER", "LOC"])
    intervals = figures.intervals(seed=0, resamples=200)
    assert intervals["f1_PER"] == (1.0, 1.0)
    assert intervals["f1"][0] < 0.5 < intervals["f1"][1]
    assert math.isnan(intervals["f1_LOC"][0])


@pytest.mark.parametrize(
    ("predictions", "references", "types", "message"),
    [
        ([["O"]], [], ["PER"], "1 predictions for 0 references"),
        ([], [], ["PER"], "at least one"),
        ([["O"], ["O"]], [["O"], ["O", "O"]], ["PER"], r"predictions\[1\] has 1 tags for 2 words"),
        ([["O", "B-secret"]], [["O", "O"]], ["PER"], r"predictions\[0\]\[1\] is no tag of the 1 types"),
        ([["O"]], [["secret"]], ["PER"], r"references\[0\]\[0\] is no tag"),
        ([["O"]], [[""]], ["PER"], r"references\[0\]\[0\] is no tag"),
        ([["O"]], [["S-PER"]], ["PER"], r"references\[0\]\[0\] is no tag"),
        ([["O", "O"]], [["O", "I-PER"]], ["PER"], r"references\[0\]\[1\]: an I- that continues no entity"),
        ([["O", "O"]], [["B-LOC", "I-PER"]], ["PER", "LOC"], r"references\[0\]\[1\]: an I- that continues"),
        (["O"], [["O"]], ["PER"], r"predictions\[0\] is a text"),
        ([["O"]], [["O"]], ["PER", "PER"], "twice"),
        ([["O"]], [["O"]], ["-PER"], "begins or ends"),
        ([["O"]], [["O"]], [""], "empty"),
    ],
)
def test_what_does_not_fit_is_refused_without_its_words(predictions, references, types, message):
    with pytest.raises(InputError, match=message) as refused:
        scores(predictions, references, types)
    assert "secret" not in str(refused.value)
