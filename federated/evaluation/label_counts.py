"""Counts for F1: which of some public labels the model gives to a held-out unit whose text ends in one of them.

A unit is a true positive of one label, or a false positive of one and a false negative of another: its part of the
counts has a 2-norm of at most the square root of 2, whatever the model answers.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import normalize

import numpy as np
import numpy.typing as npt
import torch

from trainer.metrics.measures import COUNTS
from trainer.tasks.task import Encoded

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


def examples_of(task: Any, texts: Sequence[str], labels: Sequence[str]) -> list[Example]:
    """The units that are examples of a label: at most one example per unit.

    A text ends in a label when the label stands last, white space after it aside, and is no part of a longer word. Text
    and label are tokenised together, as in training. A unit that would be truncated with one of them is no example.

    Args:
        task: how text becomes tokens: one whose records are texts.
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


def label_counts(model: Any, task: Any, examples: Sequence[Example], num_labels: int) -> npt.NDArray[np.float64]:
    """True positives, false positives and false negatives of each label, shape (3, L).

    Each example is scored by itself: beside others its likelihoods would be rounded differently, and one unit could
    change another one's answer.
    """
    counts = np.zeros((len(COUNTS), num_labels))
    for example in examples:
        answer = _answer(model, task, example)
        if answer == example.truth:
            counts[0, answer] += 1
        else:
            counts[1, answer] += 1
            counts[2, example.truth] += 1
    return counts


def _answer(model: Any, task: Any, example: Example) -> int:
    """The label with which the whole text is likeliest; of several the first.

    A likelihood that is not finite counts as the smallest. Endings are computed one at a time: how many are computed at
    once would decide where likelihoods are nearly equal.
    """
    with torch.no_grad():
        nats = [task.record_nats(model, task.collate([ending])).item() for ending in example.endings]
    return int(np.argmin(np.nan_to_num(nats, nan=np.inf, neginf=np.inf)))
