"""What is measured of a model's answers: bounded sums over records, and the ratios that people read."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

COUNTS = ("true positives", "false positives", "false negatives")
OVERLAP = "answer_chrf"


@dataclass(frozen=True)
class Ratio:
    """A figure: one weighted sum over another.

    Attributes:
        above: weights of the sums above the line, by name; a count's name is its sum over all labels.
        below: those below it.
    """

    above: Mapping[str, float]
    below: Mapping[str, float]


@dataclass(frozen=True)
class Measures:
    """What a task measures: the first sums have a bound each, then come three counts of each label.

    Attributes:
        bounds: the most that one example can add to each sum, by name.
        ratios: figures by name, the one that people compare first.
        labels: whose true positives, false positives and false negatives are counted.
        counts_norm: the most that one example's counts can measure (2-norm).
        lower_is_better: whether the first figure falls as a model gets better.
    """

    bounds: Mapping[str, float]
    ratios: Mapping[str, Ratio]
    labels: tuple[str, ...] = ()
    counts_norm: float = 0.0
    lower_is_better: bool = False

    @property
    def main(self) -> str:
        """The figure that people compare first."""
        return next(iter(self.ratios))

    @property
    def num_sums(self) -> int:
        """Length of the vector."""
        return len(self.bounds) + len(COUNTS) * len(self.labels)

    def with_overlap(self) -> "Measures":
        """The same, and what the answers that the model writes have in common with the right ones: from 0 to 1."""
        ratios = {**self.ratios, OVERLAP: Ratio({OVERLAP: 1.0}, {"examples": 1.0})}
        return replace(self, bounds={**self.bounds, OVERLAP: 1.0}, ratios=ratios)

    @property
    def scale(self) -> npt.NDArray[np.float64]:
        """What a value of 1 stands for, in the order of the bounded sums."""
        return np.array(list(self.bounds.values()))

    def figures(self, sums: Sequence[float] | npt.NDArray[np.float64], errors: float = 0.0) -> dict[str, Any]:
        """The figures of whole sums, each with the standard error that noise gives it, to first order.

        Args:
            sums: in the measures' own units, counts included. Shape (S,).
            errors: standard deviation of the noise on each sum as a share of its bound; 0: there is none.

        Returns:
            Each ratio, and with labels ``macro_f1`` and ``f1_by_label``; an error beside each where there is noise.
            None for what the noise has left without a positive denominator.
        """
        values, counts = np.split(np.asarray(sums, dtype=np.float64), [len(self.bounds)])
        by_name = dict(zip(self.bounds, values, strict=True))
        deviations = {name: errors * bound for name, bound in self.bounds.items()}
        by_name |= zip(COUNTS, counts.reshape(len(COUNTS), -1).sum(axis=1), strict=True)
        deviations |= dict.fromkeys(COUNTS, errors * math.sqrt(len(self.labels)))
        found: dict[str, Any] = {}
        for name, ratio in self.ratios.items():
            found |= _named(name, *_ratio(ratio, by_name, deviations), errors)
        if self.labels:
            found |= self._f1(counts.reshape(len(COUNTS), len(self.labels)), errors)
        return found

    def _f1(self, counts: npt.NDArray[np.float64], error: float) -> dict[str, Any]:
        f1 = Ratio({"tp": 2.0}, {"tp": 2.0, "fp": 1.0, "fn": 1.0})
        deviations = dict.fromkeys(("tp", "fp", "fn"), error)
        by_label = [
            _ratio(f1, dict(zip(("tp", "fp", "fn"), counts[:, index], strict=True)), deviations)
            for index in range(len(self.labels))
        ]
        # A label that nobody has and no answer names says nothing, where counts are exact.
        known = [pair for pair in by_label if pair[0] is not None]
        whole = bool(known) and (not error or len(known) == len(self.labels))
        mean = sum(value or 0.0 for value, _ in known) / len(known) if whole else None
        spread = math.hypot(*(size or 0.0 for _, size in known)) / len(known) if whole else None
        each = {label: _named("f1", *pair, error) for label, pair in zip(self.labels, by_label, strict=True)}
        return {**_named("macro_f1", mean, spread, error), "f1_by_label": each}


def _named(name: str, value: float | None, spread: float | None, error: float) -> dict[str, float | None]:
    return {name: value, f"{name}_error": spread} if error else {name: value}


def _ratio(
    ratio: Ratio, sums: Mapping[str, float], deviations: Mapping[str, float]
) -> tuple[float | None, float | None]:
    """A ratio of sums whose noises are independent, and its standard error to first order."""
    above = sum(weight * sums[name] for name, weight in ratio.above.items())
    below = sum(weight * sums[name] for name, weight in ratio.below.items())
    if not below > math.hypot(*(weight * deviations[name] for name, weight in ratio.below.items())):
        return None, None
    value = above / below
    moved = {name: ratio.above.get(name, 0.0) - value * ratio.below.get(name, 0.0) for name in sums}
    return float(value), float(math.hypot(*(size * deviations[name] for name, size in moved.items())) / below)
