"""How well named entities are found, by seqeval: an entity counts if its type and both of its ends are right."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from configs.errors import InputError
from trainer.metrics.inputs import check_lists, check_pairs, library
from trainer.metrics.scores import Indices, Scores

Tags = Sequence[Sequence[str]]


def scores(predictions: Tags, references: Tags, types: Sequence[str]) -> Scores:
    """Precision, recall and F1 of all entities, and F1 of each type (``f1_TYPE``).

    Tags are strict IOB2 (B-TYPE, I-TYPE, O). An I- that continues nothing is no entity in a prediction.

    Args:
        predictions: tags of the words of each text.
        references: the right ones.
        types: all that there are.

    Raises:
        InputError: numbers of texts or of words differ, or there are no texts; a tag is unknown; a reference has an I-
            that continues nothing; seqeval is not installed.
    """
    _check(predictions, references, types)
    counts_NT3 = _counts(predictions, references, types)

    def figures(drawn: Indices) -> dict[str, float]:
        by_type = counts_NT3[drawn].sum(axis=0)
        right, found, wanted = by_type.sum(axis=0).tolist()
        empty = np.nan if found + wanted == 0 else 0.0
        return {
            "precision": right / found if found else empty,
            "recall": right / wanted if wanted else empty,
            "f1": _f1(right, found, wanted),
            **{f"f1_{name}": _f1(*counts.tolist()) for name, counts in zip(types, by_type, strict=True)},
        }

    return Scores(len(references), figures)


def _f1(right: int, found: int, wanted: int) -> float:
    return 2 * right / (found + wanted) if found + wanted else float("nan")


def _counts(predictions: Tags, references: Tags, types: Sequence[str]) -> Indices:
    """For each text and type the number of entities found rightly, found, and to be found, (N, T, 3)."""
    scheme = library("seqeval.scheme")
    place = {name: number for number, name in enumerate(types)}
    counts = np.zeros((len(references), len(types), 3), np.intp)
    found, wanted = (scheme.Entities(tags, scheme.IOB2).entities for tags in (predictions, references))
    for number, (guess, truth) in enumerate(zip(found, wanted, strict=True)):
        for column, entities in enumerate((set(guess) & set(truth), guess, truth)):
            for entity in entities:
                counts[number, place[entity.tag], column] += 1
    return counts


def _check(predictions: Tags, references: Tags, types: Sequence[str]) -> None:
    check_pairs(predictions, references)
    tags = {"O"} | {f"{prefix}-{name}" for prefix in "BI" for name in types}
    if len(tags) != 2 * len(types) + 1 or any(name != name.strip("-") or not name for name in types):
        raise InputError("types: one stands twice, is empty, or begins or ends with '-'; give names without")
    for name, texts in (("predictions", predictions), ("references", references)):
        check_lists(name, texts)
        for number, text in enumerate(texts):
            if unknown := [word for word, tag in enumerate(text) if tag not in tags]:
                raise InputError(
                    f"{name}[{number}][{unknown[0]}] is no tag of the {len(types)} types; give O, B-TYPE or I-TYPE"
                )
    for number, (guess, truth) in enumerate(zip(predictions, references, strict=True)):
        if len(guess) != len(truth):
            raise InputError(f"predictions[{number}] has {len(guess)} tags for {len(truth)} words; give one for each")
        for word, (before, tag) in enumerate(pairwise(["O", *truth])):
            if tag.startswith("I-") and before[2:] != tag[2:]:
                raise InputError(f"references[{number}][{word}]: an I- that continues no entity; begin each with B-")
