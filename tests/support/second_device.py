"""A device that is not the processor, wherever there is no GPU: torch's backend in Python, computed by the processor.

An operation on tensors of both devices fails, as it does on a GPU. What it can't show is a GPU's own arithmetic. The
backend changes all of a process, so whoever uses it starts one of their own: as a script, this file compares.
"""

import json
import sys
from typing import Any

import torch
from compared_devices import compared
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

_BETWEEN = ("aten._to_copy", "aten.copy_")  # which may have tensors of both
_INDEXED = ("aten.index", "aten.index_put", "aten.index_put_")  # by tensors of the processor's, too


class Elsewhere(torch.Tensor):
    """A tensor of the second device, whose numbers the processor holds."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device="second:0",
        )  # fmt: skip

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation, by the processor, for the device that its tensors or its ``device`` say."""
    asked = kwargs.get("device")
    flat = [
        one for value in (*args, *kwargs.values()) for one in (value if isinstance(value, list | tuple) else (value,))
    ]
    if asked is None and not any(isinstance(one, Elsewhere) for one in flat):
        return func(*args, **kwargs)
    name = str(func.overloadpacket)
    tensors = [one for one in flat if isinstance(one, torch.Tensor)]
    there = [isinstance(value, Elsewhere) for value in tensors]
    here = [value for value in tensors if not isinstance(value, Elsewhere) and value.dim()]
    if any(there) and here and name not in (*_BETWEEN, *_INDEXED):
        raise RuntimeError(f"{name}: tensors on two devices")
    goes = torch.device(asked).type == "second" if asked is not None else there[:1] == [True] or sum(there) > 0
    if name == "aten.copy_":
        goes = there[0]
    low, options = tree_map_only(Elsewhere, lambda value: value.held, (args, kwargs))
    if asked is not None:
        options = {**options, "device": torch.device("cpu")}
    found = func(*low, **options)
    if name == "aten._to_copy" and goes and not any(there):
        found = found.clone()
    if not goes:
        return found
    wrapped = tree_map_only(torch.Tensor, Elsewhere, found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if any(there) else wrapped


class _Module(_DummyBackendModule):
    """``torch.second``: chance is the processor's."""

    def get_rng_state(self, _device):
        return torch.zeros(0, dtype=torch.uint8, device="cpu")

    def set_rng_state(self, _state, _device):
        pass


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


class SecondDevice(TorchFunctionMode):
    """While it lasts, ``second`` is a device."""

    def __enter__(self):
        self._operations = _Operations()
        self._operations.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._operations.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is not None:  # it can't be caught below
            device = kwargs.pop("device")
            return torch.tensor(*args, **kwargs, device="cpu").to(device)
        if func is torch.Tensor.tolist and isinstance(args[0], Elsewhere):
            return args[0].held.tolist()
        return func(*args, **kwargs)


def _mixes() -> bool:
    try:
        torch.ones(2, device="second") + torch.ones(2)
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    torch.set_num_threads(1)
    _setup_privateuseone_for_python_backend("second", _Module())
    with SecondDevice():
        sys.stdout.write(json.dumps({**compared("second"), "mixes": float(_mixes())}))
