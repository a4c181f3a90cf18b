"""Which device a silo's model computes on, and a GPU made to give the same bits whenever it is asked for the same.

Nothing of this was run on a GPU here: ``tests/gpu`` does it wherever there is one.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch

from configs.errors import InputError

CPU = torch.device("cpu")
# By which cuBLAS gives the same bits (CUDA's manual, "Results reproducibility"); it is read when CUDA starts.
_WORKSPACE, _REPEATABLE = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


@lru_cache
def device_of(setting: str, memory_share: float = 1.0) -> torch.device:
    """The device that ``silo.device`` names, readied once per process.

    Args:
        setting: ``cpu``, ``cuda`` or ``cuda:N``; ``auto`` takes the first GPU where there is one.
        memory_share: of a GPU's memory, which this process may take.

    Raises:
        InputError: there is no such GPU, or it would not repeat its bits.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if setting == "cpu" or (setting == "auto" and not there):
        return CPU
    device = torch.device("cuda", _number(setting))
    if not there:
        raise InputError(
            f'silo.device is {setting!r}: torch {torch.__version__} sees no GPU here; give "cpu", or install a torch '
            "that is built for this machine's GPU and its driver"
        )
    if device.index >= there:
        raise InputError(f"silo.device is {setting!r}: GPUs are counted from 0, and there are {there}; give another")
    _repeatable()
    torch.cuda.set_per_process_memory_fraction(memory_share, device)
    return device


def _number(setting: str) -> int:
    return int(setting.partition(":")[2] or 0)


def _repeatable() -> None:
    """No atomic sums, no timing of kernels, no products of fewer bits."""
    workspace = os.environ.setdefault(_WORKSPACE, _REPEATABLE[0])
    if workspace not in _REPEATABLE:
        raise InputError(
            f"{_WORKSPACE} is {workspace!r}: with it a GPU's products differ from time to time; unset it, or give "
            f"{' or '.join(_REPEATABLE)}"
        )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False


def name_of(device: torch.device) -> str:
    """What people call it."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def where(model: Any) -> torch.device:
    """The device of a model's weights."""
    device: torch.device = next(model.parameters()).device
    return device


def beside(model: Any) -> AbstractContextManager[Any]:
    """Tensors that are made meanwhile lie where the model does. On a processor nothing changes, not even the time."""
    device = where(model)
    return nullcontext() if device.type == "cpu" else device
