"""From a TOML file, or a preset's name, and ``--set`` overrides to a checked ``RunConfig``."""

import os
import re
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.parse import PRESETS, parse, presets, read_toml
from configs.schema.places import here, rooted
from configs.schema.schema import RunConfig
from configs.storage.sealing import ENVIRONMENT, FROM_ENVIRONMENT

_PART = re.compile(r"""\s*(?:"(?:[^"\\]|\\.)*"|'[^']*'|[^\s."'=][^."'=]*)\s*""")
_OVERRIDE = re.compile(rf"(?P<key>{_PART.pattern}(?:\.{_PART.pattern})*)=(?P<text>.*)", re.DOTALL)


def load(config: str, overrides: Sequence[str] = (), *, elsewhere: bool = False) -> RunConfig:
    """Reads and checks a configuration. Its paths are absolute, by the rule of ``configs.schema.places``.

    Args:
        config: path of a TOML file, or the name of a preset (``demo``, ``tiny``, ...).
        overrides: ``group.field=value`` texts; keys and values are read as in TOML, a bare word as text.
        elsewhere: other machines will read the settings, so that a relative path is refused.

    Raises:
        InputError: no such file, not TOML, or a setting that does not hold; one line for each.
    """
    preset = config in presets()
    path = PRESETS / f"{config}.toml" if preset else Path(config)
    tree, given = read_toml(path), None if elsewhere else here()
    folder = given if preset or elsewhere else path.parent.resolve()
    tree = rooted(RunConfig, tree, folder, str(path))
    for override in overrides:
        _apply(tree, override, given)
    return parse(RunConfig, _with_key(rooted(RunConfig, tree, folder, str(path), fill=True)), str(path))


def _with_key(tree: dict[str, Any]) -> dict[str, Any]:
    """Decides once whether a run is encrypted: its processes may start elsewhere.

    A key in the environment is never passed over: whoever set it would believe that the run is encrypted.
    """
    run = tree.get("run")
    if not isinstance(run, dict) or run.get("encryption_key_file") or not os.environ.get(ENVIRONMENT):
        return tree
    return {**tree, "run": {**run, "encryption_key_file": FROM_ENVIRONMENT}}


def _apply(tree: dict[str, Any], override: str, folder: Path | None) -> None:
    *groups, name, text = _split(override)
    inner: dict[str, Any] = {name: _value(override, text)}
    for part in reversed(groups):
        inner = {part: inner}
    inner = rooted(RunConfig, inner, folder, f"--set {override!r}")
    for part in groups:
        tree, inner = tree.setdefault(part, {}), inner[part]
        if not isinstance(tree, dict):
            raise InputError(f"--set {override!r}: {part} is a value, not a group of settings")
    tree[name] = inner[name]


def _split(override: str) -> list[str]:
    """The parts of the key, and the value's text."""
    found = _OVERRIDE.fullmatch(override)
    if found:
        parts = [part.strip() for part in _PART.findall(found["key"])]
        with suppress(ValueError):  # a quoted part with an escape that TOML does not have
            names = [str(_toml(part)) if part[0] in "\"'" else part for part in parts]
            if len(names) > 1:
                return [*names, found["text"]]
    raise InputError(
        f"--set {override!r}: write it as group.field=value, for instance pretrain.steps=100; a part with a point, an "
        'equals sign or a quotation mark is quoted as in TOML: group.field."St. Mary"=100'
    )


def _value(override: str, text: str) -> Any:
    """A value as TOML has it; what is no TOML is plain text, unless it begins as a list, a table or quoted text."""
    try:
        return _toml(text)
    except (ValueError, RecursionError) as error:
        if not text.lstrip().startswith(("[", "{", '"', "'")):
            return text
        reason = str(error).partition(" (at ")[0]
        raise InputError(
            f'--set {override!r}: {text!r} is no TOML ({reason}); write a list as ["a", "b"], a table as {{a = 1}}, '
            "other text that begins so in quotation marks, and single quotes around it all, for the shell"
        ) from None


def _toml(text: str) -> Any:
    """A single value.

    Raises:
        ValueError: the text is none, or more than one.
        RecursionError: it is nested too deeply.
    """
    tree = tomllib.loads(f"value = {text}")
    if len(tree) != 1:
        raise ValueError("more than one value")
    return tree["value"]
