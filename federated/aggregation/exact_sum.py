"""An exact sum of updates: each is rounded once, on its way in, so their order doesn't matter."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from federated.adapters.arrays import Arrays, check_shapes, check_values

_FRACTION_BITS = 32
_LARGEST_COUNT = 2**15
_BLOCK = 2**13  # values that are added at once: what is made on the way stays in the processor's cache


class FixedPointSum:
    """Adds float32 arrays as 64-bit integers: exact and associative, so replies may come in any order.

    A value is rounded to a multiple of 2^-32 once, on its way in; sums of up to 2^15 updates can't overflow.
    Small arrays are added many at once, as one: an adapter has dozens, and numpy's calls would cost more than its sums.
    """

    def __init__(self, template: Mapping[str, npt.NDArray[np.float32]]) -> None:
        self._template = template
        self._blocks = _blocks(template)
        self._totals = [np.zeros(sum(template[name].size for name in names), np.int64) for names in self._blocks]
        self.count = 0

    def add(self, update: Mapping[str, npt.NDArray[np.float32]], weight: float = 1.0) -> None:
        """Folds one update in.

        Args:
            update: the arrays.
            weight: public, from 0 to 1: what each of its values is multiplied by.

        Raises:
            ValueError: see ``check_update``; or there are too many updates.
        """
        check_shapes(update, self._template)
        check_values(self._flat(update))  # all of it, before anything is added: a bad update leaves no part behind
        if self.count >= _LARGEST_COUNT:
            raise ValueError(f"more than {_LARGEST_COUNT} updates in one round")
        scale = weight * 2.0**_FRACTION_BITS
        for number, flat in enumerate(self._flat(update)):
            self._totals[number] += np.rint(flat.astype(np.float64) * scale).astype(np.int64)
        self.count += 1

    def _flat(self, update: Mapping[str, npt.NDArray[np.float32]]) -> Iterator[npt.NDArray[np.float32]]:
        return (np.concatenate([update[name].reshape(-1) for name in names]) for names in self._blocks)

    def mean(self) -> Arrays:
        """The sum over the number of updates, whatever their weights are: a late update moves the mean less."""
        scale = 2.0**-_FRACTION_BITS / self.count
        means: Arrays = {}
        for names, total in zip(self._blocks, self._totals, strict=True):
            ends = np.cumsum([self._template[name].size for name in names])
            for name, part in zip(names, np.split((total * scale).astype(np.float32), ends[:-1]), strict=True):
                means[name] = part.reshape(self._template[name].shape)
        return means


def _blocks(template: Mapping[str, npt.NDArray[Any]]) -> list[list[str]]:
    """The names, in their order, in runs of few values; a large array is one by itself."""
    blocks: list[list[str]] = []
    size = _BLOCK
    for name, array in template.items():
        if size + array.size > _BLOCK:
            blocks.append([])
            size = 0
        blocks[-1].append(name)
        size += array.size
    return blocks
