"""What every measure asks of its inputs, and of the libraries behind it."""

import re
from collections.abc import Iterable, Sequence, Sized
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.errors import InputError

_LANGUAGE = re.compile(r"([a-z]{2,3})([-_].*)?")


def library(module: str) -> Any:
    """A module of the extra ``tasks``, imported when it is first needed.

    Raises:
        InputError: it is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError:
        package = module.partition(".")[0]
        raise InputError(
            f"{package} is not installed, which this metric is made with; pip install 'siloweave[tasks]'"
        ) from None


def check_pairs(predictions: Sized, references: Sized) -> None:
    """There is a prediction for each reference, and at least one of them.

    Raises:
        InputError: there isn't.
    """
    if len(predictions) != len(references):
        raise InputError(f"{len(predictions)} predictions for {len(references)} references; give one for each")
    if not len(references):
        raise InputError("no predictions and no references; give at least one of each")


def check_lists(name: str, values: Iterable[object]) -> None:
    """Each value is a collection of texts: a single text would be taken for a list of its characters.

    Raises:
        InputError: one is a text.
    """
    for number, value in enumerate(values):
        if isinstance(value, str):
            raise InputError(f"{name}[{number}] is a text; give a list of texts")


def check_references(references: Sequence[Sequence[str]]) -> None:
    """Each example has a list of texts that are right, and at least one.

    Raises:
        InputError: one has a text instead, or none.
    """
    check_lists("references", references)
    for number, accepted in enumerate(references):
        if not len(accepted):
            raise InputError(f"references[{number}] is empty; give at least one right text")


def codes(name: str, values: Sequence[str], labels: Sequence[str]) -> npt.NDArray[np.intp]:
    """Each value's place among the labels, (N,).

    Raises:
        InputError: a value is no label, which is told by its place, since it may be anything; or a label stands twice.
    """
    place = {label: number for number, label in enumerate(labels)}
    if len(place) != len(labels):
        raise InputError("labels: one stands twice; name each once")
    for number, value in enumerate(values):
        if value not in place:
            raise InputError(f"{name}[{number}] is none of the {len(labels)} labels; map it to one, or add it to them")
    return np.array([place[value] for value in values], np.intp)


def primary_language(language: str) -> str:
    """The language alone, without script and region: "zh" of "zh-Hans-CN".

    Raises:
        InputError: it is no such code.
    """
    found = _LANGUAGE.fullmatch(language.lower())
    if not found:
        raise InputError(f"language {language!r}: give its ISO 639 code, for instance 'en' or 'zh'")
    return found.group(1)
