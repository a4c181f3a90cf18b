"""Opacus' PRV accountant without the rest of Opacus.

Its package imports torch and much of what trains, three seconds of it, while the accountant takes numpy and scipy
alone: whoever verifies a certificate needs no more.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

_NAME = "_siloweave_opacus_accountants"  # another name than Opacus' own, which can be imported beside it


class _Accountant:
    """What Opacus' accountants take of their base class, whose module imports torch for a type hint."""

    def __init__(self) -> None:
        self.history: list[tuple[float, float, int]] = []


def prv_accountant() -> Any:
    """The class ``PRVAccountant``, of the very source that ``opacus.accountants`` has.

    Raises:
        ModuleNotFoundError: Opacus is not installed.
    """
    if _NAME not in sys.modules:
        spec = find_spec("opacus")
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError("No module named 'opacus'", name="opacus")
        base, package = ModuleType(f"{_NAME}.accountant"), ModuleType(_NAME)
        base.__dict__["IAccountant"] = _Accountant
        package.__path__ = [str(Path(folder) / "accountants") for folder in spec.submodule_search_locations]
        sys.modules[base.__name__] = base
        sys.modules[_NAME] = package
    return import_module(f"{_NAME}.prv").PRVAccountant
