"""Several adapters on one model: each is read when it is asked for, and the one asked for longest ago makes room."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from configs.errors import InputError
from configs.storage.files import digest_file
from trainer.inference.lanes import Lane

_MIB = 2**20
_UNKNOWN = ""  # what is on the model, after it was wrapped or an adapter could not be read


class Adapters:
    """Adapters on a model whose weights they share.

    Args:
        base: the model; it is wrapped.
        limit: bytes that adapters may take together; None: as many as there are.
    """

    def __init__(self, base: Any, limit: int | None = None) -> None:
        self._base, self._limit = base, limit
        self._wrapped: Any = None
        self._folders: dict[str, Callable[[], AbstractContextManager[Path]]] = {}
        self._digests: dict[str, dict[str, str]] = {}
        self._sizes: dict[str, int] = {}
        self._lanes: dict[str, Lane] = {}
        self._loaded = list[str]()  # the one that was asked for last at the end
        self._on: str | None = _UNKNOWN

    @property
    def loaded(self) -> tuple[str, ...]:
        """Those in memory, the one that was asked for longest ago first."""
        return tuple(self._loaded)

    def add(self, name: str, folder: Callable[[], AbstractContextManager[Path]]) -> None:
        """Reads an adapter for the first time: it fits its model, and what it is now it has to be later.

        Args:
            name: of it.
            folder: opens where it lies in the clear.

        Raises:
            InputError: it takes more than all adapters may.
            OSError, RuntimeError, ValueError, SafetensorError: it is no adapter of this model.
        """
        self._folders[name] = folder
        self._read(name)
        own = f".{_own(name)}."
        values = [value for path, value in self._wrapped.named_parameters() if own in f"{path}."]
        size = self._sizes[name] = sum(value.numel() * value.element_size() for value in values)
        if self._limit is not None and size > self._limit:
            raise InputError(
                f"--adapters-memory {self._limit / _MIB:g}: the adapter of {name!r} alone takes {size / _MIB:.4g} MiB; "
                "give at least that"
            )
        self._make_room(0)

    def lane(self, name: str | None, shown: str) -> Lane:
        """What decodes with an adapter, or with none.

        Args:
            name: of the adapter; None: the model alone.
            shown: the name in messages.
        """
        model = self._base if self._wrapped is None else self._wrapped.get_base_model()
        if name is None:
            return Lane(model, partial(self._put_on, None), shown)
        fits = partial(self._fits, name)
        lane = self._lanes[name] = Lane(model, partial(self._put_on, name), shown, fits, room=self)
        return lane

    def _answers(self, name: str) -> bool:
        return name in self._lanes and len(self._lanes[name]) > 0

    def _fits(self, name: str) -> bool:
        """Whether there is room, or would be without those that answer nobody just now."""
        busy = sum(self._sizes[other] for other in self._loaded if other != name and self._answers(other))
        return self._limit is None or busy + self._sizes[name] <= self._limit

    def _put_on(self, name: str | None) -> None:
        """Nothing is done where it is on already. The thread that decodes asks for it, and no other one."""
        if self._wrapped is None or name == self._on:
            return
        tuner, before, self._on = self._wrapped.base_model, self._on, _UNKNOWN
        if name is None:
            tuner.disable_adapter_layers()
        else:
            if name not in self._loaded:
                self._make_room(self._sizes[name])
                self._read(name)
            self._loaded.append(self._loaded.pop(self._loaded.index(name)))
            if not before:  # it goes through the whole model, as what comes next does
                tuner.enable_adapter_layers()
            tuner.set_adapter(_own(name), inference_mode=True)
        self._on = name

    def _make_room(self, size: int) -> None:
        for name in [name for name in self._loaded if not self._answers(name)]:
            if self._limit is None or sum(self._sizes[other] for other in self._loaded) + size <= self._limit:
                return
            self._loaded.remove(name)
            self._wrapped.delete_adapter(_own(name))

    def _read(self, name: str) -> None:
        with self._folders[name]() as folder, torch.inference_mode(False):
            digests = {path.name: digest_file(path) for path in folder.iterdir() if path.is_file()}
            if self._digests.setdefault(name, digests) != digests:  # what is claimed of its privacy is of those files
                raise InputError(f"{name}: its adapter has changed since the service has started; start it again")
            if self._wrapped is None:
                from peft import PeftModel

                self._wrapped = PeftModel.from_pretrained(self._base, folder, _own(name), local_files_only=True)
            else:
                self._wrapped.load_adapter(folder, _own(name), local_files_only=True)
            self._wrapped.eval()
        self._loaded.append(name)


def _own(name: str) -> str:
    """The adapter's name in peft, which makes a module's name of it: no dot, and no method of torch's."""
    return f"served/{name.replace('.', '/')}"
