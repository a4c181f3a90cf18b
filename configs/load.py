"""From a TOML file, or a preset's name, and ``--set`` overrides to a checked ``RunConfig``."""

import os
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError

from configs.artifacts import MANIFEST, digest_json, write_atomic
from configs.encryption import ENVIRONMENT, FROM_ENVIRONMENT
from configs.errors import InputError
from configs.mirror import CONFIG, mirror_directory, open_mirror
from configs.schema import RunConfig
from configs.storage import COMMITTED

PRESETS = Path(__file__).parent
Model = TypeVar("Model", bound=BaseModel)
_PROBLEMS_SHOWN, _LARGEST_PROBLEM = 10, 600


def presets() -> list[str]:
    """Names of the shipped configurations."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


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


def config_digest(config: RunConfig) -> str:
    """Digest of the settings that shape results, for manifests."""
    return digest_json({name: value for name, value in flatten(config) if name not in _MOVABLE})


def to_toml(config: BaseModel) -> str:
    """The resolved settings as TOML; ``load`` reads it back to the same value."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def bind_run_directory(config: RunConfig) -> Path:
    """Creates the run's directory, or checks that it belongs to this configuration.

    Where a run's storage is reached from may change between two starts; what shapes its results may not.

    Returns:
        The run's directory.

    Raises:
        InputError: the directory was made with other settings; the message names them. Or the object store can't be
            written, read and cleaned.
    """
    directory, mirror = run_directory(config), open_mirror(config)
    if mirror is None:
        _bind(config, directory)
    else:
        mirror.bucket.prove()
        mirror.pull()
        _bind(config, directory)
        mirror.push_file(CONFIG)
    return directory


def _bind(config: RunConfig, directory: Path) -> None:
    stored = directory / CONFIG
    if not stored.exists():
        write_atomic(stored, to_toml(config).encode())
        return
    before = parse(RunConfig, read_toml(stored), str(stored))
    content = to_toml(config).encode()
    if before == config:
        return
    if not _holds_work(directory):  # an earlier start failed before it made anything, for instance over a wrong path
        write_atomic(stored, content)
        return
    changed = [
        f"{name} was {old!r} and is {new!r}"
        for (name, old), (_, new) in zip(flatten(before), flatten(config), strict=True)
        if old != new and name not in _MOVABLE
    ]
    if changed:
        raise InputError(
            f"{config.run.url or directory}: belongs to another configuration ({'; '.join(changed)}); choose another "
            "run.name, or delete that directory"
        )
    write_atomic(stored, content)


def _holds_work(directory: Path) -> bool:
    """Whether any stage has committed something there."""
    return any(next(directory.rglob(name), None) is not None for name in (MANIFEST, COMMITTED))


def run_directory(config: RunConfig) -> Path:
    """Absolute path of the run's directory on this machine: its mirror where ``run.storage`` is an object store."""
    return mirror_directory(config) if config.run.url else (Path(config.run.storage) / config.run.name).absolute()


_MOVABLE = {
    "run.storage",
    "run.encryption_key_file",
    "pretrain.micro_batch_size",
    "pretrain.commit_every",
    "pretrain.keep_commits",
    "pretrain.validate_every",
    "pretrain.spike_ratio",
    "pretrain.max_rollbacks",
    "pretrain.offload_folder",
    "cluster.world_size",
    "cluster.min_world_size",
    "cluster.address",
    "cluster.max_failures",
    "cluster.standbys",
    "cluster.hang_timeout_s",
    "cluster.placement_timeout_s",
    "cluster.scratch_dir",
    "federated.state_dir",
    "federated.workers",
    "federated.round_timeout_s",
    "privacy.budget_epsilon",
    "privacy.budget_delta",
    "evaluate.public.source",
    "evaluate.public.text",
    "evaluate.public.split",
    "evaluate.prompt",
    "evaluate.sample_tokens",
    "evaluate.temperature",
    "monitoring.tensorboard",
    "monitoring.mlflow",
    "monitoring.mlflow_experiment",
    "monitoring.ray_metrics",
    "tune.early_stopping",
    "tune.grace_steps",
    "tune.reduction_factor",
}


def flatten(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Every setting by its full name, for instance ``pretrain.steps``."""
    for group, value in config:
        yield from _flatten_group(group, value)


def _flatten_group(prefix: str, group: BaseModel) -> Iterator[tuple[str, Any]]:
    for name, value in group:
        if isinstance(value, BaseModel):
            yield from _flatten_group(f"{prefix}.{name}", value)
        else:
            yield f"{prefix}.{name}", value
