"""Adapters as bytes: safetensors, float32, names in order; and an exact sum in which order doesn't matter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

Arrays = dict[str, npt.NDArray[np.float32]]

_FRACTION_BITS = 32
_LARGEST_VALUE = 2.0**15
_LARGEST_COUNT = 2**15
_LARGEST_DIMENSIONS, _LARGEST_SIDE = 8, 2**31 - 1
_LARGEST_HEADER = 2**20  # bytes; of 600,000 empty arrays it would take 23 s and 1 GiB to read
_BLOCK = 2**13  # values that are added at once: what is made on the way stays in the processor's cache


def to_bytes(arrays: Mapping[str, npt.NDArray[np.float32]]) -> bytes:
    """Safetensors bytes; equal arrays have equal bytes."""
    return save({name: np.ascontiguousarray(arrays[name], dtype=np.float32) for name in sorted(arrays)})


def from_bytes(content: bytes) -> Arrays:
    """The arrays of safetensors bytes, whatever the bytes are.

    Raises:
        ValueError: not safetensors, not float32, of a shape that no array has, or with more names than an adapter has.
    """
    if len(content) >= 8 and (header := int.from_bytes(content[:8], "little")) > _LARGEST_HEADER:
        raise ValueError(f"not safetensors of an adapter (a header of {header} bytes, at most {_LARGEST_HEADER})")
    try:
        found = deserialize(content)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise ValueError(f"not safetensors ({error})") from None
    return {name: _array(name, entry) for name, entry in found}


def _array(name: str, entry: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    if entry["dtype"] != "F32":
        raise ValueError(f"{name[:100]!r} is {entry['dtype']}, an adapter is float32 (F32)")
    shape = entry["shape"]
    if len(shape) > _LARGEST_DIMENSIONS or any(side > _LARGEST_SIDE for side in shape):
        raise ValueError(f"{name[:100]!r} has a shape that no adapter has")
    # Own memory: what safetensors gives is a read-only view of the message.
    return np.frombuffer(entry["data"], dtype=np.float32).reshape(shape).copy()


def check_shapes(update: Mapping[str, npt.NDArray[np.float32]], like: Mapping[str, npt.NDArray[Any]]) -> None:
    """Refuses an update of other arrays.

    Raises:
        ValueError: names or shapes differ.
    """
    if {name: array.shape for name, array in update.items()} != {name: array.shape for name, array in like.items()}:
        raise ValueError("its names or shapes are not the adapter's")


def check_update(update: Mapping[str, npt.NDArray[np.float32]], like: Mapping[str, npt.NDArray[Any]]) -> None:
    """Refuses an update that can't be added to the arrays that it changes.

    Raises:
        ValueError: names or shapes differ, or a value is not finite or beyond 2^15.
    """
    check_shapes(update, like)
    _check_values(update.values())


def _check_values(arrays: Iterable[npt.NDArray[np.float32]]) -> None:
    if not all(np.abs(array).max(initial=0) < _LARGEST_VALUE for array in arrays):  # false for a NaN, too
        raise ValueError(f"a value is not finite or not below {_LARGEST_VALUE:g}")


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

    def add(self, update: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Folds one update in.

        Raises:
            ValueError: see ``check_update``; or there are too many updates.
        """
        check_shapes(update, self._template)
        _check_values(self._flat(update))  # all of it, before anything is added: a bad update leaves no part behind
        if self.count >= _LARGEST_COUNT:
            raise ValueError(f"more than {_LARGEST_COUNT} updates in one round")
        for number, flat in enumerate(self._flat(update)):
            self._totals[number] += np.rint(flat.astype(np.float64) * 2.0**_FRACTION_BITS).astype(np.int64)
        self.count += 1

    def _flat(self, update: Mapping[str, npt.NDArray[np.float32]]) -> Iterator[npt.NDArray[np.float32]]:
        return (np.concatenate([update[name].reshape(-1) for name in names]) for names in self._blocks)

    def mean(self) -> Arrays:
        """The sum over the number of updates: equal, public weights."""
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
