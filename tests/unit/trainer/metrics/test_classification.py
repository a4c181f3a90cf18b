"""Figures of classes on scikit-learn's own example and by hand; calibration against its curve; what is refused."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve

from configs.errors import InputError
from trainer.metrics.classification import (
    confusion_matrix,
    multilabel_confusion_matrix,
    multilabel_scores,
    scores,
)

LABELS = ["ant", "bird", "cat"]
# scikit-learn's example of a confusion matrix
TRUTH = ["cat", "ant", "cat", "cat", "ant", "bird"]
GUESS = ["ant", "ant", "cat", "cat", "ant", "cat"]


def test_the_documented_confusion_matrix():
    assert confusion_matrix(GUESS, TRUTH, LABELS).tolist() == [[2, 0, 0], [0, 0, 1], [1, 0, 2]]


def test_a_label_that_nobody_has_keeps_its_row_and_column():
    assert confusion_matrix(["a"], ["a"], ["a", "b"]).tolist() == [[1, 0], [0, 0]]


def test_figures_by_hand():
    figures = scores(GUESS, TRUTH, LABELS)
    assert dict(figures) == pytest.approx(
        {
            "accuracy": 4 / 6,
            **{f"{name}_micro": 4 / 6 for name in ("precision", "recall", "f1")},
            "precision_macro": (2 / 3 + 0 + 2 / 3) / 3,
            "recall_macro": (1 + 0 + 2 / 3) / 3,
            "f1_macro": (4 / 5 + 0 + 2 / 3) / 3,
        }
    )


def test_a_label_that_does_not_occur_is_no_part_of_the_macro_mean():
    assert dict(scores(GUESS, TRUTH, [*LABELS, "dog"])) == dict(scores(GUESS, TRUTH, LABELS))


def test_calibration_by_hand():
    """Of two that are sure by 0.95 one is right, and both of two that are sure by 0.55: gaps of 0.45 and 0.45."""
    figures = scores(["a", "a", "b", "b"], ["a", "b", "b", "b"], ["a", "b"], [0.95, 0.95, 0.55, 0.55])
    assert figures["expected_calibration_error"] == pytest.approx(0.45)
    figures = scores(["a", "a", "b", "b"], ["a", "b", "b", "b"], ["a", "b"], [0.95, 0.95, 1.0, 0.0])
    assert figures["expected_calibration_error"] == pytest.approx((0.9 + 0 + 1) / 4)


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=60))
def test_calibration_is_that_of_scikit_learns_curve(examples):
    confidences, right = (np.array(values) for values in zip(*examples, strict=True))
    frequency, confidence = calibration_curve(right, confidences, n_bins=15)
    bins = np.searchsorted(np.linspace(0, 1, 16)[1:-1], confidences)
    expected = (np.abs(frequency - confidence) * np.unique(bins, return_counts=True)[1]).sum() / len(examples)
    figures = scores(["a" if good else "b" for good in right], ["a"] * len(examples), ["a", "b"], confidences)
    assert figures["expected_calibration_error"] == pytest.approx(expected)


# Three examples by hand: x is found once of twice, y twice of once, z never and never there.
SEVERAL_TRUTH = [["x"], ["x", "y"], []]
SEVERAL_GUESS = [["x"], ["y"], ["y"]]


def test_several_labels_by_hand():
    figures = multilabel_scores(SEVERAL_GUESS, SEVERAL_TRUTH, ["x", "y", "z"])
    assert dict(figures) == pytest.approx(
        {
            "accuracy": 1 / 3,
            **{f"{name}_micro": 2 / 3 for name in ("precision", "recall", "f1")},
            "precision_macro": (1 + 1 / 2) / 2,
            "recall_macro": (1 / 2 + 1) / 2,
            "f1_macro": 2 / 3,
        }
    )
    assert multilabel_confusion_matrix(SEVERAL_GUESS, SEVERAL_TRUTH, ["x", "y", "z"]).tolist() == [
        [[1, 0], [1, 1]],
        [[1, 1], [0, 1]],
        [[3, 0], [0, 0]],
    ]


def test_calibration_of_several_labels_is_of_each_label_of_each_example():
    figures = multilabel_scores([["x"], []], [["x"], ["y"]], ["x", "y"], [[0.9, 0.1], [0.3, 0.5]])
    assert figures["expected_calibration_error"] == pytest.approx((0.1 + 0.1 + 0.3 + 0.5) / 4)


def test_without_any_label_only_accuracy_has_a_figure():
    figures = multilabel_scores([[], []], [[], []], ["x"])
    assert figures["accuracy"] == 1
    assert all(math.isnan(value) for name, value in figures.items() if name != "accuracy")


def test_one_label_may_be_there_or_not():
    guess, truth = [["x"], ["x"], []], [["x"], [], []]
    figures = multilabel_scores(guess, truth, ["x"], [[0.9], [0.7], [0.2]])
    assert figures["f1_macro"] == figures["f1_micro"] == pytest.approx(2 / 3)
    assert figures["expected_calibration_error"] == pytest.approx((0.1 + 0.7 + 0.2) / 3)
    assert multilabel_confusion_matrix(guess, truth, ["x"]).tolist() == [[[1, 1], [0, 1]]]
    assert figures.intervals(0, resamples=20).keys() == figures.keys()


def test_one_label_each_has_the_same_figures_either_way():
    several = multilabel_scores([[label] for label in GUESS], [{label} for label in TRUTH], LABELS)
    assert dict(several) == pytest.approx(dict(scores(GUESS, TRUTH, LABELS)))
    assert several.intervals(0, resamples=20).keys() == several.keys()


@pytest.mark.parametrize(
    ("predictions", "references", "labels", "message"),
    [
        (["a"], ["a", "b"], ["a", "b"], "1 predictions for 2 references"),
        ([], [], ["a"], "at least one"),
        (["a", "secret"], ["a", "a"], ["a", "b"], r"predictions\[1\] is none of the 2 labels"),
        (["a", "a"], ["a", "secret"], ["a", "b"], r"references\[1\] is none of the 2 labels"),
        (["a"], ["a"], ["a", "a"], "twice"),
    ],
)
def test_what_does_not_fit_is_refused_without_its_words(predictions, references, labels, message):
    for measure in (scores, confusion_matrix):
        with pytest.raises(InputError, match=message) as refused:
            measure(predictions, references, labels)
        assert "secret" not in str(refused.value)


def test_a_text_is_no_list_of_labels():
    with pytest.raises(InputError, match=r"predictions\[1\] is a text"):
        multilabel_scores([["a"], "a"], [["a"], ["a"]], ["a"])
    with pytest.raises(InputError, match=r"references\[1\]\[1\] is none"):
        multilabel_scores([["a"], ["a"]], [["a"], ["a", "b"]], ["a"])


@pytest.mark.parametrize(
    ("confidences", "message"),
    [
        ([0.5], "shape"),
        ([[0.5], [0.5]], "shape"),
        ([0.5, math.nan], "within 0 and 1"),
        ([0.5, 1.5], "within 0 and 1"),
        ([-0.1, 0.5], "within 0 and 1"),
    ],
)
def test_confidences_are_probabilities_one_each(confidences, message):
    with pytest.raises(InputError, match=message):
        scores(["a", "a"], ["a", "a"], ["a"], confidences)


def test_a_softmax_that_rounds_above_one_is_a_probability():
    figures = scores(["a"], ["a"], ["a"], [1.0000002])
    assert figures["expected_calibration_error"] == pytest.approx(0, abs=1e-6)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd")), min_size=1, max_size=12))
def test_a_bootstraps_draws_have_scikit_learns_figures(pairs):
    guess, truth = zip(*pairs, strict=True)
    figures = scores(guess, truth, list("abcde"))
    assert figures._figures(np.arange(len(pairs))) == pytest.approx(dict(figures))


subsets = st.sets(st.sampled_from("abc"))


@given(st.lists(st.tuples(subsets, subsets), min_size=1, max_size=12))
def test_a_bootstraps_draws_of_several_labels_have_scikit_learns_figures(pairs):
    guess, truth = zip(*pairs, strict=True)
    figures = multilabel_scores(guess, truth, list("abcd"))
    assert figures._figures(np.arange(len(pairs))) == pytest.approx(dict(figures), nan_ok=True)
