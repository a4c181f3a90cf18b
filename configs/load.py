"""From a TOML file, or a preset's name, and ``--set`` overrides to a checked ``RunConfig``."""

import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.parse import PRESETS, parse, presets, read_toml
from configs.schema.schema import RunConfig
from configs.storage.sealing import ENVIRONMENT, FROM_ENVIRONMENT


def load(config: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads and checks a configuration.

    Args:
        config: path of a TOML file, or the name of a preset (``demo``, ``tiny``, ...).
        overrides: ``group.field=value`` texts; a value is read as TOML, or else as plain text.

    Raises:
        InputError: no such file, not TOML, or a setting that does not hold; one line for each.
    """
    path = PRESETS / f"{config}.toml" if config in presets() else Path(config)
    tree = read_toml(path)
    for override in overrides:
        _apply(tree, override)
    return parse(RunConfig, _with_key(tree), str(path))


def _with_key(tree: dict[str, Any]) -> dict[str, Any]:
    """Decides once whether a run is encrypted, and by which key: its processes may start elsewhere.

    A key in the environment is never passed over: whoever set it would believe that the run is encrypted.
    """
    run = tree.get("run")
    if not isinstance(run, dict):
        return tree
    source = run.get("encryption_key_file") or (FROM_ENVIRONMENT if os.environ.get(ENVIRONMENT) else "")
    if isinstance(source, str) and source not in ("", FROM_ENVIRONMENT):
        source = str(Path(source).expanduser().absolute())
    return {**tree, "run": {**run, "encryption_key_file": source}}


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or len(parts) < 2:
        raise InputError(f"--set {override!r}: write it as group.field=value, for instance pretrain.steps=100")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for part in parts[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise InputError(f"--set {override!r}: {part} is a value, not a group of settings")
    tree[parts[-1]] = value
