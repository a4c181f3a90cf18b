"""All that can be said of a score in the clear: our own figures and the standard libraries', with intervals.

Our own are those that a private evaluation has, too. A library that is not installed is named, and the rest is there.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.errors import InputError
from configs.schema.tasks import POOLED, TaskSpec
from trainer.metrics import classification, entities, perplexity, question_answering, summarisation, translation
from trainer.metrics.chrf import chrf
from trainer.metrics.measures import OVERLAP
from trainer.metrics.scores import Indices, Scores
from trainer.scoring.score import Score
from trainer.tasks.entities import types_of

OWN = "siloweave"


@dataclass(frozen=True)
class _Asked:
    """What figures are made of."""

    score: Score
    spec: TaskSpec
    language: str

    @property
    def given(self) -> list[Any]:
        return [answer.given.answer for answer in self.score.answers]

    @property
    def right(self) -> list[Any]:
        return [answer.right for answer in self.score.answers]

    @property
    def texts(self) -> tuple[list[str], list[list[str]], str]:
        return self.given, [[right] for right in self.right], self.language

    @property
    def probabilities(self) -> npt.NDArray[np.float64] | None:
        """Of each record and label; None where a model has diverged."""
        found = np.array([answer.given.probabilities for answer in self.score.answers])
        return found if np.isfinite(found).all() else None


def _own(asked: _Asked) -> Scores:
    measures, rows = asked.score.measures, asked.score.rows
    names = [*measures.ratios, *(["macro_f1"] if measures.labels else [])]

    def figures(drawn: Indices) -> dict[str, float]:
        found = Score(measures, rows[drawn]).figures
        return {name: math.nan if found[name] is None else found[name] for name in names}

    return Scores(len(rows), figures)


def _perplexity(asked: _Asked) -> Scores:
    place = {name: number for number, name in enumerate(asked.score.measures.bounds)}
    nats, tokens, characters = (asked.score.rows[:, place[name]] for name in ("nats", "tokens", "characters"))
    return perplexity.scores(nats.tolist(), tokens.tolist(), characters.tolist())


def _classes(asked: _Asked) -> Scores:
    probabilities = asked.probabilities
    confidences = None if probabilities is None else probabilities.max(axis=1).tolist()
    return classification.scores(asked.given, asked.right, asked.spec.labels, confidences)


def _label_sets(asked: _Asked) -> Scores:
    return classification.multilabel_scores(asked.given, asked.right, asked.spec.labels, asked.probabilities)


def _entities(asked: _Asked) -> Scores:
    return entities.scores(asked.given, asked.right, types_of(asked.spec.labels))


def _spans(asked: _Asked) -> Scores:
    return question_answering.scores(asked.given, asked.right, asked.language)


def _overlap(asked: _Asked) -> Scores:
    values_N = np.array([chrf(given, right) for given, right in zip(asked.given, asked.right, strict=True)])
    return Scores(len(values_N), lambda drawn: {OVERLAP: float(values_N[drawn].mean())})


def _translations(asked: _Asked) -> Scores:
    return translation.scores(*asked.texts)


def _summaries(asked: _Asked) -> Scores:
    return summarisation.scores(*asked.texts)


Made = tuple[str, Callable[[_Asked], Scores]]
_MEASURES: Made = (OWN, _own)
_MADE: dict[str, tuple[Made, ...]] = {
    "causal": ((OWN, _perplexity),),
    "classification": (("scikit-learn", _classes),),
    "multilabel": (("scikit-learn", _label_sets),),
    "entities": (("seqeval", _entities),),
    "qa": (("SQuAD", _spans),),
    "chat": ((OWN, _overlap), ("sacrebleu", _translations)),
    "translation": ((OWN, _overlap), ("sacrebleu", _translations)),
    "summarisation": ((OWN, _overlap), ("rouge-score", _summaries)),
}
"""By whom each task's figures are made, and how, besides the measures of the task itself."""


def in_full(score: Score, spec: TaskSpec, language: str, seed: int) -> dict[str, Any]:
    """A score's figures for JSON.

    Args:
        score: with units, and with answers where the task has any.
        spec: the task.
        language: of the right answers.
        seed: of the intervals' draws.

    Returns:
        ``records`` and ``units``; ``figures`` by who makes them and by name, each with ``value`` and ``interval``, None
        where there is none; ``missing``, a line for each maker that is lacking; and for labels ``confusion`` (rows are
        right labels) and ``reliability`` (mean probability, frequency and number of predictions, bin by bin).
    """
    asked, figures, missing = _Asked(score, spec, language), dict[str, dict[str, Any]](), dict[str, None]()
    plots: dict[str, Any] = {}
    if score.records:
        known = score.answers or spec.name == "causal"
        for by, make in (_MEASURES, *(_MADE[spec.name] if known else ())):
            with _missed(missing):
                made = _with_intervals(make(asked), score.units, seed)
                figures[by] = {**figures.get(by, {}), **made}
        with _missed(missing):
            plots = _of_labels(asked)
    counts = {"records": score.records, "units": len(set(score.units))}
    return {**counts, "figures": figures, "missing": list(missing), **plots}


@contextmanager
def _missed(lines: dict[str, None]) -> Iterator[None]:
    """Goes on where a library is not installed, or the answers are none that it can compare."""
    try:
        yield
    except InputError as error:
        lines[str(error)] = None


def _of_labels(asked: _Asked) -> dict[str, Any]:
    """What a confusion matrix and a reliability diagram are drawn from."""
    if asked.spec.name not in POOLED or not asked.score.answers:
        return {}
    labels, probabilities_NL = asked.spec.labels, asked.probabilities
    if asked.spec.name == "multilabel":
        happened_NL = np.array([[label in right for label in labels] for right in asked.right])
        return {"reliability": _reliability(probabilities_NL, happened_NL)}
    right_N = np.array([given == right for given, right in zip(asked.given, asked.right, strict=True)])
    chosen_N = None if probabilities_NL is None else probabilities_NL.max(axis=1)
    confusion = classification.confusion_matrix(asked.given, asked.right, labels).tolist()
    return {"confusion": confusion, "labels": list(labels), "reliability": _reliability(chosen_N, right_N)}


def _reliability(probabilities: npt.NDArray[np.float64] | None, happened: npt.NDArray[np.bool_]) -> list[Any]:
    return [] if probabilities is None else classification.reliability(probabilities, happened)


def _with_intervals(scores: Scores, units: tuple[int, ...], seed: int) -> dict[str, Any]:
    intervals = scores.intervals(seed, units) if len(set(units)) > 1 else {}
    return {
        name: {"value": _known(value), "interval": _interval(intervals.get(name, (math.nan, math.nan)))}
        for name, value in scores.items()
    }


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _interval(found: tuple[float, float]) -> list[float] | None:
    return list(found) if all(map(math.isfinite, found)) else None
