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


def import_large(*modules: str) -> None:
    """Imports modules that import much else; idempotent."""
    if any(name not in sys.modules for name in modules):
        with uncollected():
            for name in modules:
                importlib.import_module(name)
