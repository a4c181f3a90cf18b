"""How well texts are classified, with one label each or several, by scikit-learn."""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from configs.errors import InputError
from trainer.metrics.inputs import check_lists, check_pairs, codes, library
from trainer.metrics.scores import Indices, Scores

_AVERAGES = ("micro", "macro")
_BINS = np.linspace(0, 1, 16)[1:-1]  # 15 of equal width, as in Guo et al., 2017
_ROUNDING = 1e-6  # by which a softmax in float32 may exceed 1


def scores(
    predictions: Sequence[str],
    references: Sequence[str],
    labels: Sequence[str],
    confidences: Sequence[float] | None = None,
) -> Scores:
    """Accuracy; precision, recall and F1, micro and macro; with confidences also the expected calibration error.

    Macro figures are means over the labels that occur, in predictions or references.

    Args:
        predictions: a label of each example.
        references: the right label of each.
        labels: all that there are.
        confidences: the model's probability of each prediction.

    Raises:
        InputError: numbers of examples differ, or there are none; a label is unknown; a confidence is no probability;
            scikit-learn is not installed.
    """
    guess, truth = _single(predictions, references, labels)
    metrics = library("sklearn.metrics")
    whole = {
        "accuracy": float(metrics.accuracy_score(truth, guess)),
        **_averages(metrics, truth, guess, np.union1d(truth, guess)),
    }
    every = np.arange(len(labels))
    return _with_draws(
        guess[:, None] == every, truth[:, None] == every, whole, _calibration(confidences, guess == truth)
    )


def multilabel_scores(
    predictions: Sequence[Collection[str]],
    references: Sequence[Collection[str]],
    labels: Sequence[str],
    probabilities: npt.ArrayLike | None = None,
) -> Scores:
    """The same figures where an example has any number of labels; accuracy is the share with exactly the right ones.

    The calibration error compares the probability of each label of each example with whether the example has it.

    Args:
        predictions: labels of each example.
        references: the right labels of each.
        labels: all that there are.
        probabilities: the model's for each example and label, (N, L), in the order of ``labels``.

    Raises:
        InputError: as ``scores``, or labels of one example are a text instead of a list.
    """
    guess, truth = _several(predictions, references, labels)
    metrics = library("sklearn.metrics")
    found, wanted = _targets(guess), _targets(truth)
    whole = {
        "accuracy": float(metrics.accuracy_score(wanted, found)),
        **_averages(metrics, wanted, found, np.unique((found + wanted).indices)),
    }
    return _with_draws(guess, truth, whole, _calibration(probabilities, truth))


def confusion_matrix(
    predictions: Sequence[str], references: Sequence[str], labels: Sequence[str]
) -> npt.NDArray[np.int64]:
    """Number of examples by right label (rows) and predicted label (columns), in the order of ``labels``, (L, L).

    Raises:
        InputError: see ``scores``.
    """
    guess, truth = _single(predictions, references, labels)
    counts = library("sklearn.metrics").confusion_matrix(truth, guess, labels=np.arange(len(labels)))
    return np.asarray(counts, np.int64)


def multilabel_confusion_matrix(
    predictions: Sequence[Collection[str]], references: Sequence[Collection[str]], labels: Sequence[str]
) -> npt.NDArray[np.int64]:
    """For each label the number of examples without and with it (rows), predicted without and with it, (L, 2, 2).

    Raises:
        InputError: see ``multilabel_scores``.
    """
    guess, truth = _several(predictions, references, labels)
    counts = library("sklearn.metrics").multilabel_confusion_matrix(_targets(truth), _targets(guess))
    return np.asarray(counts[: len(labels)], np.int64)


def calibration_error(probabilities: npt.ArrayLike, happened: npt.ArrayLike) -> float:
    """The expected calibration error, over 15 bins of equal width (Guo et al. 2017).

    Args:
        probabilities: what a model gives to each of its predictions.
        happened: whether each was right, in the same shape.

    Raises:
        InputError: the shapes differ, or a probability is none.
    """
    right = np.asarray(happened, np.bool_)
    return _calibration(probabilities, right)(np.arange(len(right)))["expected_calibration_error"]


def reliability(probabilities: npt.ArrayLike, happened: npt.ArrayLike) -> list[list[float]]:
    """A reliability diagram: mean probability, frequency, and number of predictions, of each of 15 bins that has some.

    Args:
        probabilities: what a model gives to each of its predictions.
        happened: whether each was right, in the same shape.

    Raises:
        InputError: scikit-learn is not installed.
    """
    given, right = np.clip(np.ravel(probabilities), 0, 1), np.ravel(happened)
    calibration = library("sklearn.calibration")
    frequencies, means = calibration.calibration_curve(right, given, n_bins=len(_BINS) + 1, pos_label=True)
    counts = np.bincount(np.searchsorted(_BINS, given))
    return [list(one) for one in zip(means.tolist(), frequencies.tolist(), counts[counts > 0].tolist(), strict=True)]


def _single(predictions: Sequence[str], references: Sequence[str], labels: Sequence[str]) -> tuple[Indices, Indices]:
    check_pairs(predictions, references)
    return codes("predictions", predictions, labels), codes("references", references, labels)


def _several(
    predictions: Sequence[Collection[str]], references: Sequence[Collection[str]], labels: Sequence[str]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    check_pairs(predictions, references)
    return _indicators("predictions", predictions, labels), _indicators("references", references, labels)


def _indicators(name: str, values: Sequence[Collection[str]], labels: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Which labels each example has, (N, L)."""
    check_lists(name, values)
    has = np.zeros((len(values), len(labels)), np.bool_)
    for number, mine in enumerate(values):
        has[number, codes(f"{name}[{number}]", list(mine), labels)] = True
    return has


def _targets(has: npt.NDArray[np.bool_]) -> csr_array:
    """Sparse, since of many labels few are there, and with an empty column: one alone would be no multi-label task."""
    return csr_array(np.pad(has, ((0, 0), (0, 1))), dtype=np.int8)


def _with_draws(
    guess_NL: npt.NDArray[np.bool_],
    truth_NL: npt.NDArray[np.bool_],
    whole: dict[str, float],
    calibration: Callable[[Indices], dict[str, float]],
) -> Scores:
    """Scikit-learn's figures; those of a bootstrap's draws by the same counts, in a hundredth of its time."""
    equal_N, both_NL = (guess_NL == truth_NL).all(axis=1), guess_NL & truth_NL

    def figures(drawn: Indices) -> dict[str, float]:
        counts_3L = np.array([has_NL[drawn].sum(axis=0) for has_NL in (both_NL, guess_NL, truth_NL)])
        return {"accuracy": float(equal_N[drawn].mean()), **_by_counts(counts_3L), **calibration(drawn)}

    return Scores(len(truth_NL), figures, {**whole, **calibration(np.arange(len(truth_NL)))})


def _by_counts(counts_3L: npt.NDArray[np.intp]) -> dict[str, float]:
    """As ``_averages``, of how often each label is rightly there, there, and right."""
    present_3L = counts_3L[:, counts_3L[1:].sum(axis=0) > 0]
    figures: dict[str, float] = {}
    for average, (both, found, wanted) in (("micro", present_3L.sum(axis=1, keepdims=True)), ("macro", present_3L)):
        for name, above, below in (
            ("precision", both, found),
            ("recall", both, wanted),
            ("f1", 2 * both, found + wanted),
        ):
            shares = np.divide(above, below, out=np.zeros(len(below)), where=below > 0)
            figures[f"{name}_{average}"] = float(shares.mean()) if present_3L.size else math.nan
    return figures


def _averages(metrics: Any, truth: Any, guess: Any, present: Indices) -> dict[str, float]:
    """Precision, recall and F1, micro and macro, over the labels that occur."""
    names = ("precision", "recall", "f1")
    if not present.size:
        return {f"{name}_{average}": math.nan for average in _AVERAGES for name in names}
    figures: dict[str, float] = {}
    for average in _AVERAGES:
        *values, _ = metrics.precision_recall_fscore_support(
            truth, guess, labels=present, average=average, zero_division=0
        )
        figures |= {f"{name}_{average}": float(value) for name, value in zip(names, values, strict=True)}
    return figures


def _calibration(
    probabilities: npt.ArrayLike | None, happened: npt.NDArray[np.bool_]
) -> Callable[[Indices], dict[str, float]]:
    """Expected calibration error: the gap between probability and frequency in each bin, weighted by its share."""
    if probabilities is None:
        return lambda _: {}
    given = np.asarray(probabilities, np.float64)
    if given.shape != happened.shape:
        raise InputError(f"probabilities have the shape {given.shape}; give one for each prediction: {happened.shape}")
    if not ((given >= -_ROUNDING) & (given <= 1 + _ROUNDING)).all():
        raise InputError("probabilities: one is not within 0 and 1; give the softmax or sigmoid of the model's logits")
    bins, gaps = np.searchsorted(_BINS, given), happened - given

    def error(drawn: Indices) -> dict[str, float]:
        by_bin = np.bincount(bins[drawn].ravel(), weights=gaps[drawn].ravel())
        return {"expected_calibration_error": float(np.abs(by_bin).sum() / gaps[drawn].size)}

    return error
