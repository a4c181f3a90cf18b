"""An update in few bytes: its largest values, rounded in blocks that have a scale each, by a plan's ``Compression``.

What is packed is the noised update, or that and what earlier ones left out: nothing else that is private is looked at,
so this is post-processing, and epsilon is the same. Nothing is drawn: values are rounded to the nearest. All arrays
are one vector, in the order of their names, since both sides know what they are called and how large they are.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save

from configs.schema.federated import UpdateDtype
from federated.adapters.arrays import Arrays, flat, read_arrays, shaped
from federated.adapters.positions import positions_bytes, read, written
from federated.adapters.update_codec import decoded
from privacy.compression import SCALED, Compression

Vector = npt.NDArray[np.float32]
_VALUES, _SCALES, _POSITIONS = "values", "scales", "positions"
_LEVELS = {"int8": 127, "int4": 7}  # each way from 0
_KINDS = {"F32": np.float32, "I8": np.int8, "U8": np.uint8, "U16": np.uint16}
_HEADER_BYTES = 320  # of three arrays at most, whose names are short


def packed_bytes(compression: Compression, values: int) -> int:
    """Most bytes of a packed update of so many values."""
    parts = _parts(compression, values).values()
    return _HEADER_BYTES + sum(np.dtype(kind).itemsize * count for kind, count in parts)


def _parts(compression: Compression, values: int) -> dict[str, tuple[type[Any], int]]:
    """The arrays of a packed update: what each has, and how much of it."""
    count, dtype = compression.kept(values), compression.dtype
    kinds = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.int8, "int4": np.uint8}
    parts: dict[str, tuple[type[Any], int]] = {_VALUES: (kinds[dtype], (count + 1) // 2 if dtype == "int4" else count)}
    if dtype in SCALED:
        parts[_SCALES] = np.float32, -(-count // compression.block)
    if compression.share < 1:
        parts[_POSITIONS] = np.uint8, positions_bytes(count, values)
    return parts


def packed(update: Arrays, compression: Compression) -> bytes:
    """Bytes of an update; equal updates have equal bytes.

    With ``int8`` a value that travels is off by 1/254 of the largest in its block at most, with ``int4`` by 1/14, with
    ``bfloat16`` by 2^-8 of itself; one that doesn't travel is taken for 0.

    Raises:
        ValueError: a value is not finite.
    """
    vector = flat(update)
    if not np.isfinite(vector).all():
        raise ValueError("an update has a value that is not finite")
    parts: dict[str, npt.NDArray[Any]] = {}
    if compression.share < 1:
        chosen = _largest(vector, compression.kept(len(vector)))
        parts[_POSITIONS], vector = written(chosen, len(vector)), vector[chosen]
    if compression.dtype in SCALED:
        steps, parts[_SCALES] = _rounded(vector, compression.block, _LEVELS[compression.dtype])
        parts[_VALUES] = _halves(steps) if compression.dtype == "int4" else steps
    elif compression.dtype == "bfloat16":
        parts[_VALUES] = torch.from_numpy(vector).to(torch.bfloat16).view(torch.uint16).numpy()
    else:
        parts[_VALUES] = vector
    return save({name: np.ascontiguousarray(parts[name]) for name in sorted(parts)})


def _largest(vector: Vector, count: int) -> npt.NDArray[np.int64]:
    """Rising positions of the largest absolute values; of equal ones the first."""
    sizes = np.abs(vector)
    if not count:
        return np.zeros(0, np.int64)
    least = np.partition(sizes, len(sizes) - count)[len(sizes) - count]
    chosen = sizes > least
    chosen[np.flatnonzero(sizes == least)[: count - int(chosen.sum())]] = True
    return np.flatnonzero(chosen)


def _rounded(vector: Vector, block: int, levels: int) -> tuple[npt.NDArray[np.int8], Vector]:
    """Whole steps, and the size of a step in each block."""
    blocks = np.zeros((-(-len(vector) // block), block), np.float32)
    blocks.reshape(-1)[: len(vector)] = vector
    scales = (np.abs(blocks).max(axis=1) / np.float32(levels)).astype(np.float32)
    steps = np.rint(blocks / np.where(scales > 0, scales, np.float32(1))[:, None]).clip(-levels, levels)
    return steps.astype(np.int8).reshape(-1)[: len(vector)], scales


def _halves(steps: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Two steps in a byte, each 8 more than it is; a last one alone is beside a 0."""
    whole = np.append(steps, np.zeros(len(steps) % 2, np.int8)).astype(np.int16) + 8
    return ((whole[::2] << 4) | whole[1::2]).astype(np.uint8)


def _whole(halves: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.int8]:
    pairs = np.stack([halves >> 4, halves & 15], axis=1).reshape(-1).astype(np.int8) - np.int8(8)
    if pairs[count:].any() or (pairs < -_LEVELS["int4"]).any():
        raise ValueError("a value of 4 bits is none of the 15 that there are")
    return pairs[:count]


def unpacked(content: bytes, compression: Compression, shapes: Mapping[str, Sequence[int]]) -> Arrays:
    """The update of bytes that a silo sent, whatever they are.

    Args:
        content: the bytes.
        compression: the plan's.
        shapes: of the arrays that the silo was asked to train.

    Raises:
        ValueError: they are something else; a scale is negative or not finite; a position is out of range or repeated.
    """
    values = sum(prod(shape) for shape in shapes.values())
    found, expected = read_arrays(content, _KINDS), _parts(compression, values)
    if {name: (array.dtype.type, array.shape) for name, array in found.items()} != {
        name: (kind, (count,)) for name, (kind, count) in expected.items()
    }:
        said = ", ".join(f"{count} {name}" for name, (_, count) in expected.items())
        raise ValueError(f"the update is not the plan's {compression.dtype}: expected are {said}")
    kept = _values(found, compression, compression.kept(values))
    if compression.share == 1:
        return shaped(kept, shapes)
    vector = np.zeros(values, np.float32)
    vector[read(found[_POSITIONS], len(kept), values)] = kept
    return shaped(vector, shapes)


def read_update(content: bytes, how: Compression | UpdateDtype, like: Arrays, most_bytes: int) -> Arrays:
    """The update of bytes that a silo sent, whatever they are.

    Args:
        content: the bytes.
        how: it was asked for: as a plan says, or as arrays of a type.
        like: the arrays that the silo was asked to train.
        most_bytes: what arrays of a type may have as float32.

    Raises:
        ValueError: they are something else.
    """
    if isinstance(how, Compression):
        return unpacked(content, how, {name: array.shape for name, array in like.items()})
    return decoded(content, how, most_bytes)


def _values(found: dict[str, npt.NDArray[Any]], compression: Compression, count: int) -> Vector:
    values = found[_VALUES]
    if compression.dtype == "bfloat16":
        return np.asarray(values.astype(np.uint32) << 16).view(np.float32)
    if compression.dtype not in SCALED:
        return np.asarray(values, np.float32)
    scales = found[_SCALES]
    if not (np.isfinite(scales) & (scales >= 0)).all():
        raise ValueError("a scale of the update is negative or not finite")
    steps = _whole(values, count) if compression.dtype == "int4" else values
    with np.errstate(over="ignore"):  # what is not finite is refused by whoever folds it
        return np.asarray(steps.astype(np.float32) * np.repeat(scales, compression.block)[:count])
