"""A run's directory: which settings made it, and which of them may still change."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from configs.errors import InputError
from configs.parse import parse, read_toml, to_toml
from configs.schema.places import here, rooted
from configs.schema.schema import RunConfig
from configs.storage.files import digest_json, write_atomic
from configs.storage.layout import CONFIG, RunFiles
from configs.storage.manifests import MANIFEST
from configs.storage.mirror import mirror_directory, open_mirror
from configs.storage.storage import COMMITTED

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
    "federated.deadlines_s",
    "federated.required_silos",
    "privacy.budget_epsilon",
    "privacy.budget_delta",
    "evaluate.public.source",
    "evaluate.public.text",
    "evaluate.public.split",
    "evaluate.max_new_tokens",
    "evaluate.prompt",
    "evaluate.prompts",
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

_CHANGES_SHOWN = 10

# Settings that were added later, each with the value that stands for what was done before. At that value a setting is
# left out of the digest, so that runs from before it keep theirs.
_LATER = {
    "federated.task": "causal",
    "federated.train": "lora",
    "federated.adapter_targets": "all-linear",
    "federated.base_dtype": "float32",
    "federated.update_dtype": "float32",
    "federated.update_block": 0,
    "federated.update_share": 1.0,
    "model.source": "",
    "federated.labels": (),
    "federated.template": "",
    "federated.pooling": "model",
    "federated.continue_from": "",
    "federated.anchor": 0.0,
    **{f"federated.augmentation.{name}": 0.0 for name in ("dropout", "swap", "mask")},
    "federated.stages": (),
    "federated.grace_s": 0.0,
    "federated.schedule": "synchronous",
    "federated.buffer": 0,
    "federated.staleness_exponent": 0.5,
    "federated.max_staleness": 100,
    "federated.study": "",
    "federated.secure_aggregation": False,
    "federated.colluders": 0,
    **{f"{records}.{name}": {} for records in ("data.private", "evaluate.public") for name in ("columns", "labels")},
    "model.family": "llama",
    "model.config": "",
    "pretrain.objective": "auto",
    "privacy.evaluation_max_new_tokens": 0,
    "privacy.mode": "single",
    "privacy.min_honest": 0,
    "pretrain.stages": (),
    **dict.fromkeys(("data.private.language", "evaluate.public.language"), "en"),
    **dict.fromkeys(("data.public.encoding", "data.private.encoding", "evaluate.public.encoding"), "utf-8"),
}


def config_digest(config: RunConfig) -> str:
    """Digest of the settings that shape results, for manifests."""
    settings = (item for item in flatten(config) if item not in _LATER.items())
    return digest_json({name: value for name, value in settings if name not in _MOVABLE})


def without_later(group: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A group's settings but those that were added later and have the value that stands for what was done before."""
    return {name: value for name, value in settings.items() if (f"{group}.{name}", value) not in _LATER.items()}


def bind_run_directory(config: RunConfig) -> Path:
    """Creates the run's directory, or checks that it belongs to this configuration.

    The run's storage and other settings in ``_MOVABLE`` may change between two starts; what shapes its results may not.

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
    stored = RunFiles(directory).config
    if not stored.exists():
        write_atomic(stored, to_toml(config).encode())
        return
    tree = read_toml(stored)
    _refuse_other_ledgers(config, tree, stored)
    # Paths of runs from before all were absolute: they meant what is below the folder where the command was given.
    absolute = rooted(RunConfig, tree, here(), str(stored))
    before = parse(RunConfig, absolute, str(stored))
    content = to_toml(config).encode()
    if before == config and absolute == tree:
        return
    if not _holds_work(directory):  # an earlier start failed before it made anything, for instance over a wrong path
        write_atomic(stored, content)
        return
    old, new = dict(flatten(before)), dict(flatten(config))  # a group that may be left out has no names then
    changed = [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in {**old, **new}
        if old.get(name) != new.get(name) and name not in _MOVABLE
    ]
    if changed:
        more = [f"and {len(changed) - _CHANGES_SHOWN} more"] if len(changed) > _CHANGES_SHOWN else []
        said = "; ".join([*changed[:_CHANGES_SHOWN], *more])
        raise InputError(
            f"{config.run.url or directory}: belongs to another configuration ({said}); choose another "
            "run.name, or delete that directory"
        )
    write_atomic(stored, content)


def _refuse_other_ledgers(config: RunConfig, tree: dict[str, Any], stored: Path) -> None:
    """A run from before all paths were absolute has charged ledgers that its own file no longer finds."""
    federated = tree.get("federated")
    before = federated.get("state_dir") if isinstance(federated, dict) else None
    if not isinstance(before, str) or before.startswith("/") or not RunFiles(stored.parent).federated.exists():
        return
    if not config.federated.state_dir.endswith(f"/{before}"):
        raise InputError(
            f"{stored}: federated.state_dir was {before!r}, below the folder where the run was started: its ledgers "
            "are there; give that folder, with --set federated.state_dir=FOLDER"
        )


def _holds_work(directory: Path) -> bool:
    """Whether any stage has committed something there."""
    return any(next(directory.rglob(name), None) is not None for name in (MANIFEST, COMMITTED))


def run_directory(config: RunConfig) -> Path:
    """Absolute path of the run's directory on this machine: its mirror where ``run.storage`` is an object store."""
    return mirror_directory(config) if config.run.url else Path(config.run.storage) / config.run.name


def flatten(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Every setting by its full name, for instance ``pretrain.steps``."""
    for group, value in config:
        yield from _flatten_group(group, value)


def _flatten_group(prefix: str, group: BaseModel) -> Iterator[tuple[str, Any]]:
    for name, value in group:
        if isinstance(value, BaseModel):
            yield from _flatten_group(f"{prefix}.{name}", value)
        elif inner := _groups(value):
            for key, one in inner.items():
                yield from _flatten_group(f"{prefix}.{name}.{key}", one)
        else:
            yield f"{prefix}.{name}", value


def _groups(value: Any) -> dict[Any, BaseModel]:
    """Groups in a list, or by name; none where the value is something else."""
    found = dict(enumerate(value)) if isinstance(value, tuple) else value
    is_groups = isinstance(found, dict) and any(isinstance(one, BaseModel) for one in found.values())
    return found if is_groups else {}
