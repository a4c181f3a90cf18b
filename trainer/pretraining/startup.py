"""What a rank imports before anything else: the libraries, without those parts that cost seconds and are not used."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from configs.imports import import_large, uncollected


def import_libraries(tell: Callable[[str], None] = lambda _: None) -> None:
    """Imports torch, DeepSpeed and transformers' models; idempotent.

    ``tell`` hears which one is next: on a busy machine all of them take as long as a rank may be silent.

    DeepSpeed's autotuner imports mlflow where it is installed (two seconds), and its Muon optimizer, which every first
    backward imports, has its kernels compiled by torch's inductor (another one and a half). Transformers takes scipy's
    optimizers for losses of object detection (half a second) and torchao for quantised weights (a quarter of one), and
    accelerate boto3, for machines that it would rent (a fifth of one). None of them is used here. A rank reads no
    weights but its own commits; for the rest of its process, transformers takes torchao for not installed.
    """
    with uncollected():
        tell("import of torch")
        import torch  # noqa: F401

        tell("import of deepspeed")
        with _hidden("mlflow"):
            from deepspeed.runtime import compiler
        with replaced(compiler, "compile", _not_compiled):
            import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

        tell("import of transformers")
        with _hidden("scipy"), _hidden("boto3"), _hidden("torchao"):
            import_large("transformers.models.llama.modeling_llama")


class Start:
    """The phases of a rank's start: enters each, and keeps how long it took.

    Args:
        enter: called with step 0 and the phase's name.
    """

    def __init__(self, enter: Callable[[int, str], None]) -> None:
        self._enter = enter
        self._began: list[tuple[str, float]] = []

    def imports(self) -> None:
        """Runs the first phase, the imports."""
        self.phase("import")
        import_libraries(lambda name: self._enter(0, name))

    def phase(self, name: str) -> None:
        """Begins the next phase."""
        self._enter(0, name)
        self._began.append((name, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """How long each phase took, the last one up to now."""
        ends = [*(began for _, began in self._began[1:]), time.perf_counter()]
        return {name: end - began for (name, began), end in zip(self._began, ends, strict=True)}


@contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Inside the context, importing the module fails, as if it were not installed."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # documented: an import of it raises
    try:
        yield
    finally:
        del sys.modules[module]


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Gives an attribute of a module or a class another value, inside the context."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _not_compiled(*_: Any, **__: Any) -> Callable[[Any], Any]:
    return lambda function: function
