"""A silo's update on its way back: as it is, or rounded to fewer bytes after everything else was done to it.

What is rounded is the noised update, by itself: nothing else that is private is looked at, so this is post-processing,
and epsilon is the same with each.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save
from safetensors.torch import save as save_tensors

from configs.schema.federated import UpdateDtype
from federated.adapters.arrays import Arrays, from_bytes, read_arrays, to_bytes

UPDATE_DTYPES: tuple[UpdateDtype, ...] = ("float32", "bfloat16", "int8")
BYTES_OF: dict[UpdateDtype, int] = {"float32": 4, "bfloat16": 2, "int8": 1}
_SCALE = " scale"  # no parameter's name has a blank
_LARGEST_INT8 = 127


def encoded(update: Arrays, dtype: UpdateDtype) -> bytes:
    """Safetensors bytes of an update; equal updates have equal bytes.

    ``bfloat16`` rounds each value to the nearest one with 8 significant bits (half to even): it is off by 2^-8 of
    itself at most. ``int8`` rounds each value to a multiple of its array's largest absolute value / 127: it is off by
    1/254 of that one at most. What is not finite stays so, and is refused where it arrives.
    """
    if dtype == "bfloat16":
        tensors = {name: torch.from_numpy(np.ascontiguousarray(update[name])) for name in sorted(update)}
        return save_tensors({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()})
    if dtype == "int8":
        scaled: dict[str, npt.NDArray[Any]] = {}
        for name in sorted(update):
            scaled[name], scaled[name + _SCALE] = _scaled(update[name])
        return save(scaled)
    return to_bytes(update)


def _scaled(array: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    largest = np.abs(array).max(initial=0)  # NaN where one is
    scale = np.float32(largest) / np.float32(_LARGEST_INT8)
    if not np.isfinite(scale) or scale == 0:
        return np.ones(array.shape, np.int8), np.array(scale, np.float32)
    steps = np.rint(array / scale).clip(-_LARGEST_INT8, _LARGEST_INT8)
    return np.ascontiguousarray(steps, dtype=np.int8), np.array(scale, np.float32)


def decoded(content: bytes, dtype: UpdateDtype, most_bytes: int) -> Arrays:
    """The update of bytes that a silo sent, whatever they are.

    Args:
        content: the bytes.
        dtype: what was asked for.
        most_bytes: what it may have as float32.

    Raises:
        ValueError: they are something else, or become more than ``most_bytes``.
    """
    if dtype == "float32":
        return from_bytes(content)
    found = read_arrays(content, {"BF16": np.uint16} if dtype == "bfloat16" else {"I8": np.int8, "F32": np.float32})
    if (size := BYTES_OF["float32"] * sum(array.size for array in found.values())) > most_bytes:
        raise ValueError(f"the update has {size} bytes as float32, one to this request has at most {most_bytes}")
    if dtype == "bfloat16":
        return {name: np.asarray(array.astype(np.uint32) << 16).view(np.float32) for name, array in found.items()}
    steps = {name: array for name, array in found.items() if not name.endswith(_SCALE)}
    scales = {name: found[name + _SCALE] for name in steps if name + _SCALE in found}
    if 2 * len(scales) != len(found) or not all(_is_scaled(steps[name], scales[name]) for name in scales):
        raise ValueError("the update is not int8 with one float32 scale for each array")
    with np.errstate(all="ignore"):  # what is not finite is refused by whoever folds it
        return {name: np.asarray(array.astype(np.float32) * scales[name]) for name, array in steps.items()}


def _is_scaled(steps: npt.NDArray[Any], scale: npt.NDArray[Any]) -> bool:
    return steps.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == ()
