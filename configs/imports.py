"""Imports of large libraries, without the searches for garbage and the reading twice that they would set off."""

import functools
import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside the context, Python looks for no garbage, and what is there at the end is never looked at again.

    Torch and transformers make a million objects that stay as long as the process does. Python would look at all of
    them again and again meanwhile, which takes a fifth of the time.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if before:
            gc.enable()


def import_large(*modules: str) -> None:
    """Imports modules that import much else; idempotent."""
    if any(name not in sys.modules for name in modules):
        with uncollected(), _read_once():
            for name in modules:
                importlib.import_module(name)


class _ReadOnce:
    """Has transformers keep what it has read in its folders of models.

    At its import it looks into all their files, and once more when it first gives a model. It keeps what it has found,
    but of the last 128 folders alone, which by then are not those that it comes to first.
    """

    def find_spec(self, *_: Any) -> None:
        utils = sys.modules.get("transformers.utils.import_utils")
        read: Any = getattr(utils, "create_import_structure_from_path", None)
        if hasattr(read, "cache_parameters") and read.cache_parameters()["maxsize"] is not None:
            setattr(utils, read.__name__, functools.cache(read.__wrapped__))


@contextmanager
def _read_once() -> Iterator[None]:
    finder: Any = _ReadOnce()  # asked at every import, also at the one between the function's making and its first use
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
