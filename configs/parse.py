"""Reads a TOML into a model of settings, or says in one line what is wrong with it."""

import json
import stat
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError

from configs.errors import InputError, SiloweaveError

PRESETS = Path(__file__).parent
Model = TypeVar("Model", bound=BaseModel)
_PROBLEMS_SHOWN, _LARGEST_PROBLEM = 10, 600


def json_object(content: bytes | str, origin: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: the content is no JSON object, or holds a name twice: readers would differ in which one they see.
    """
    try:
        value = json.loads(content, object_pairs_hook=partial(_each_once, origin))
    except InputError:
        raise
    except (ValueError, RecursionError):
        raise InputError(f"{origin}: not JSON; give the file as it was written") from None
    if not isinstance(value, dict):
        raise InputError(f"{origin}: {type(value).__name__}, expected a JSON object; give the file as it was written")
    return value


def _each_once(origin: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise InputError(f"{origin}: {name[:100]!r} is there twice; give the file as it was written")
        found[name] = value
    return found


@contextmanager
def reading(path: Path, fix: str) -> Iterator[None]:
    """Reads a file, or what was read from it, that may be damaged or of another version.

    Args:
        path: the file.
        fix: what to do about it.

    Raises:
        InputError: instead of whatever goes wrong with a file that holds something else than we write.
    """
    refuse_stream(path, fix)
    try:
        yield
    except SiloweaveError:
        raise
    except OSError as error:
        raise InputError(f"{error.filename or path}: can't be read ({error.strerror or error}); {fix}") from None
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError):
        raise InputError(f"{path}: damaged, or not of this version of Siloweave; {fix}") from None


def refuse_stream(path: Path, fix: str) -> None:
    """Refuses a pipe, a socket or a device in a file's place: whoever opens one may wait for ever.

    Raises:
        InputError: it is one.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # whoever reads it says so
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError(f"{path}: is no regular file; {fix}")


def presets() -> list[str]:
    """Names of the shipped configurations."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a tree.

    Raises:
        InputError: it is missing, unreadable, or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give a TOML file or a preset ({', '.join(presets())})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not TOML: {error}") from None


def parse(schema: type[Model], tree: dict[str, Any], origin: str) -> Model:
    """Validates a tree; each problem becomes one line with field, value and fix.

    Raises:
        InputError: the tree doesn't fit the schema.
    """
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        lines = [_shortened(_explain(problem)) for problem in error.errors()[:_PROBLEMS_SHOWN]]
        more = [f"and {error.error_count() - len(lines)} more"] if error.error_count() > len(lines) else []
        raise InputError(f"{origin}: " + "; ".join([*lines, *more])) from None


def _shortened(text: str) -> str:
    """What a stranger's document holds is repeated in part only."""
    return (
        text
        if len(text) <= _LARGEST_PROBLEM
        else f"{text[: _LARGEST_PROBLEM // 2]} ... {text[-_LARGEST_PROBLEM // 2 :]}"
    )


def _explain(problem: Any) -> str:
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{field}: no such setting; remove it or check its spelling"
    if problem["type"] == "missing":
        return f"{field}: missing; give it a value"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{field} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def to_toml(config: BaseModel) -> str:
    """The resolved settings as TOML; ``load`` reads it back to the same value."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
