"""Where this checkout is, and which of its modules a process has loaded."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SUPPORT = Path(__file__).parent


def found_below(modules: Iterable[str], roots: Iterable[str]) -> set[str]:
    """Those of some modules that are, or lie below, one of some roots; a root that exists nowhere is an error."""
    roots = tuple(roots)
    unknown = [root for root in roots if find_spec(root) is None]
    assert not unknown, f"no such module, so nothing is checked by it: {unknown}"
    return {module for module in modules if any(f"{module}.".startswith(f"{root}.") for root in roots)}
