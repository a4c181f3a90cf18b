"""Adapters as bytes: safetensors, float32, names in order."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Arrays = dict[str, npt.NDArray[np.float32]]

_LARGEST_VALUE = 2.0**15
_LARGEST_DIMENSIONS, _LARGEST_SIDE = 8, 2**31 - 1
_LARGEST_HEADER = 2**20  # bytes; of 600,000 empty arrays it would take 23 s and 1 GiB to read


def flat(arrays: Mapping[str, npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    """All values, in the order of the names."""
    each = [np.asarray(arrays[name], np.float32).reshape(-1) for name in sorted(arrays)]
    return np.concatenate(each) if each else np.zeros(0, np.float32)


def shaped(values: npt.NDArray[np.float32], shapes: Mapping[str, Sequence[int]]) -> Arrays:
    """The arrays whose values these are, as ``flat`` has them."""
    ends = np.cumsum([prod(shapes[name]) for name in sorted(shapes)])[:-1]
    parts = zip(sorted(shapes), np.split(values, ends), strict=True)
    return {name: part.reshape(tuple(shapes[name])) for name, part in parts}


def to_bytes(arrays: Mapping[str, npt.NDArray[np.float32]]) -> bytes:
    """Safetensors bytes; equal arrays have equal bytes."""
    return save({name: np.ascontiguousarray(arrays[name], dtype=np.float32) for name in sorted(arrays)})


def from_bytes(content: bytes) -> Arrays:
    """The float32 arrays of safetensors bytes, whatever the bytes are.

    Raises:
        ValueError: see ``read_arrays``.
    """
    return read_arrays(content, {"F32": np.float32})


def read_arrays(content: bytes, kinds: Mapping[str, type[Any]]) -> dict[str, npt.NDArray[Any]]:
    """The arrays of safetensors bytes, whatever the bytes are.

    Args:
        content: the bytes.
        kinds: the types of safetensors that are read, each with numpy's for its bytes.

    Raises:
        ValueError: not safetensors, another type, a shape that no array has, or more names than an adapter has.
    """
    if len(content) >= 8 and (header := int.from_bytes(content[:8], "little")) > _LARGEST_HEADER:
        raise ValueError(f"not safetensors of an adapter (a header of {header} bytes, at most {_LARGEST_HEADER})")
    try:
        found = deserialize(content)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise ValueError(f"not safetensors ({error})") from None
    return {name: _array(name, entry, kinds) for name, entry in found}


def _array(name: str, entry: Mapping[str, Any], kinds: Mapping[str, type[Any]]) -> npt.NDArray[Any]:
    if entry["dtype"] not in kinds:
        raise ValueError(f"{name[:100]!r} is {entry['dtype']}, expected is {' or '.join(kinds)}")
    shape = entry["shape"]
    if len(shape) > _LARGEST_DIMENSIONS or any(side > _LARGEST_SIDE for side in shape):
        raise ValueError(f"{name[:100]!r} has a shape that no adapter has")
    # Own memory: what safetensors gives is a read-only view of the message.
    return np.frombuffer(entry["data"], dtype=kinds[entry["dtype"]]).reshape(shape).copy()


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
    check_values(update.values())


def check_values(arrays: Iterable[npt.NDArray[np.float32]]) -> None:
    """Refuses values that an exact sum has no room for.

    Raises:
        ValueError: one is not finite or beyond 2^15.
    """
    if not all(np.abs(array).max(initial=0) < _LARGEST_VALUE for array in arrays):  # false for a NaN, too
        raise ValueError(f"a value is not finite or not below {_LARGEST_VALUE:g}")
