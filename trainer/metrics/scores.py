"""Figures of a task by name, with bootstrap intervals."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from configs.errors import InputError

Indices = npt.NDArray[np.intp]
_TAILS = (0.025, 0.975)


class Scores(Mapping[str, float]):
    """Figures of all examples. A figure that is 0/0 is nan: there was nothing to find, and nothing was found."""

    def __init__(
        self, count: int, figures: Callable[[Indices], dict[str, float]], whole: dict[str, float] | None = None
    ) -> None:
        """Computes the figures.

        Args:
            count: number of examples.
            figures: figures of the examples with these numbers, which may repeat; always with the same names.
            whole: figures of all examples by a library that takes too long for a bootstrap's draws; None: by
                ``figures`` as well.
        """
        self._count, self._figures = count, figures
        self._values = figures(np.arange(count)) if whole is None else whole

    def __getitem__(self, name: str) -> float:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def intervals(
        self, seed: int, units: Sequence[Hashable] | None = None, resamples: int = 1000
    ) -> dict[str, tuple[float, float]]:
        """95% percentile bootstrap interval of each figure (Efron and Tibshirani, 1993, chapter 13).

        Whole units are drawn with replacement: examples of one person, or of one text, tell less than as many of
        different ones. A draw in which a figure is nan is left out of that figure's interval.

        Args:
            seed: of the draws.
            units: whom each example belongs to; without it each example is a unit.
            resamples: number of draws.

        Raises:
            InputError: there is not one unit for each example, or only one unit in all.
        """
        order, starts, sizes = self._by_unit(units)
        generator, drawn = np.random.default_rng(seed), []
        for _ in range(resamples):
            draw = generator.integers(len(sizes), size=len(sizes))
            ends = sizes[draw].cumsum()
            places = np.arange(ends[-1]) + np.repeat(starts[draw] - ends + sizes[draw], sizes[draw])
            drawn.append(self._figures(order[places]))
        return {name: _interval(np.array([figures[name] for figures in drawn])) for name in self}

    def _by_unit(self, units: Sequence[Hashable] | None) -> tuple[Indices, Indices, Indices]:
        """The examples' numbers unit by unit; where each unit begins among them, and how many it has."""
        owners = range(self._count) if units is None else units
        if len(owners) != self._count:
            raise InputError(f"{len(owners)} units for {self._count} examples; give one for each")
        place = {unit: number for number, unit in enumerate(dict.fromkeys(owners))}
        if len(place) < 2:
            raise InputError("one unit: its figures have no interval; give at least two")
        codes = np.array([place[unit] for unit in owners], np.intp)
        sizes = np.bincount(codes)
        return np.argsort(codes, kind="stable"), sizes.cumsum() - sizes, sizes


def _interval(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    defined = values[~np.isnan(values)]
    if not defined.size:
        return (float("nan"), float("nan"))
    low, high = np.quantile(defined, _TAILS)
    return (float(low), float(high))
