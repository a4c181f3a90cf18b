"""Imports of large libraries, without the searches for garbage that they would set off."""

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager


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


def collect_rarely() -> None:
    """Has Python look for garbage after ten thousand new objects, and not after seven hundred.

    For a process whose commands import much, each at its own place: the searches among what stays anyway are a tenth of
    its start.
    """
    gc.set_threshold(10_000, 20, 20)


def import_large(*modules: str) -> None:
    """Imports modules that import much else; idempotent."""
    if any(name not in sys.modules for name in modules):
        with uncollected():
            for name in modules:
                importlib.import_module(name)
