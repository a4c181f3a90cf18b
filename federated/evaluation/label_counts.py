"""Counts for F1: which of some public labels the model gives to a held-out unit whose text ends in one of them.

A unit is a true positive of one label, or a false positive of one and a false negative of another: its part of the
counts has a 2-norm of at most the square root of 2, whatever the model answers.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import normalize

import numpy as np
import numpy.typing as npt
import torch

from trainer.tasks.task import Encoded, Task

KINDS = ("true positives", "false positives", "false negatives")
SQUARED_SENSITIVITY = 2.0


@dataclass(frozen=True)
class Example:
    """A unit that ends in a label.

    Attributes:
        endings: the unit as tokens, with each label in its label's place.
        truth: index of its own label.
    """

    endings: tuple[Encoded, ...]
    truth: int


def examples_of(task: Task, texts: Sequence[str], labels: Sequence[str]) -> list[Example]:
    """The units that are examples of a label: at most one example per unit.

    A text ends in a label when the label stands last, white space after it aside, and is no part of a longer word. Text
    and label are tokenised together, as in training. A unit that would be truncated with one of them is no example.

    Args:
        task: how text becomes tokens.
        texts: the held-out units.
        labels: public, found in either of Unicode's forms; the longest that fits the end is the unit's label.
    """
    forms = {normalize(form, label): index for form in ("NFC", "NFD") for index, label in enumerate(labels)}
    forms |= {label: index for index, label in enumerate(labels)}
    at_the_end = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, forms))})\Z")
    examples = []
    for text in texts:
        kept = text.rstrip()
        found = at_the_end.search(kept)
        if found is None:
            continue
        endings = tuple(task.encode(kept[: found.start()] + label) for label in labels)
        if not any(ending.truncated for ending in endings):
            examples.append(Example(endings, forms[found[0]]))
    return examples


def label_counts(model: Any, task: Task, examples: Sequence[Example], num_labels: int) -> npt.NDArray[np.float64]:
    """True positives, false positives and false negatives of each label, shape (3, L).

    Each example is scored by itself: beside others its likelihoods would be rounded differently, and one unit could
    change another one's answer.
    """
    counts = np.zeros((len(KINDS), num_labels))
    for example in examples:
        answer = _answer(model, task, example)
        if answer == example.truth:
            counts[0, answer] += 1
        else:
            counts[1, answer] += 1
            counts[2, example.truth] += 1
    return counts


def _answer(model: Any, task: Task, example: Example) -> int:
    """The label with which the whole text is likeliest; of several the first.

    A likelihood that is not finite counts as the smallest. Endings are computed one at a time: how many are computed at
    once would decide where likelihoods are nearly equal.
    """
    with torch.no_grad():
        nats = [task.record_nats(model, task.collate([ending])).item() for ending in example.endings]
    return int(np.argmin(np.nan_to_num(nats, nan=np.inf, neginf=np.inf)))


def f1_figures(counts: npt.NDArray[np.float64], error: float, labels: Sequence[str]) -> dict[str, Any]:
    """F1 of each label and their mean, each with the standard error that the noise gives it, to first order.

    Args:
        counts: noised, summed over the silos. Shape (3, L).
        error: standard deviation of the noise on each count.
        labels: their names, in the order of the counts.

    Returns:
        ``macro_f1``, ``macro_f1_error`` and, by label, ``f1``; None for what the noise has left without a positive
        denominator, which for the mean is any label's.
    """
    found = {label: _f1(counts[:, index], error) for index, label in enumerate(labels)}
    known = [(value, spread) for value, spread in found.values() if value is not None and spread is not None]
    macro: tuple[float | None, float | None] = (None, None)
    if len(known) == len(labels):
        values, spreads = zip(*known, strict=True)
        macro = sum(values) / len(labels), math.hypot(*spreads) / len(labels)
    by_label = {label: {"f1": value, "f1_error": spread} for label, (value, spread) in found.items()}
    return {"macro_f1": macro[0], "macro_f1_error": macro[1], "f1_by_label": by_label}


def _f1(counts: npt.NDArray[np.float64], error: float) -> tuple[float | None, float | None]:
    true_positives, false_positives, false_negatives = counts
    below = 2 * true_positives + false_positives + false_negatives
    if below <= math.sqrt(6) * error:  # its own standard error
        return None, None
    f1 = 2 * true_positives / below
    # The derivative by true positives is 2 (1 - F1) / below, by either of the others -F1 / below.
    return float(f1), float(error * math.sqrt(4 * (1 - f1) ** 2 + 2 * f1**2) / below)
