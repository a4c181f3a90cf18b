"""Committed checkpoints: a folder ``step-N`` counts only once ``COMMITTED``, its manifest, is there."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.run_directory import without_later
from configs.schema.data import corpora
from configs.schema.schema import RunConfig
from configs.storage.bucket import Bucket
from configs.storage.files import digest_json
from configs.storage.layout import RunFiles
from configs.storage.manifests import Manifest
from configs.storage.sealing import MasterKey, read_sealed, seal
from configs.storage.storage import Folder, Storage, committed, newest_commit, read_commit
from trainer.checkpoints.scratch import scratch_folder
from trainer.models import config_file

# No weight depends on the number of ranks either: it may change at any restart.
_NO_WEIGHT_DEPENDS_ON = {
    "offload_folder",
    "micro_batch_size",
    "commit_every",
    "keep_commits",
    "validate_every",
    "spike_ratio",
    "max_rollbacks",
}


KIND, UNIT = "checkpoint", "step"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose digests hold.

    Attributes:
        directory: a local folder with its files: in the run's storage, or fetched from there.
        step: steps done.
        manifest: its metadata has ``step`` and ``world_size``, the number of ranks that wrote it.
    """

    directory: Path
    step: int
    manifest: Manifest


def step_name(step: int) -> str:
    """Folder name of a step, so that names sort as numbers do."""
    return f"{UNIT}-{step:08d}"


def storage(config: RunConfig, run_directory: Path) -> Storage:
    """Where a run's checkpoints are: in its folder, or straight in the object store.

    Raises:
        InputError: there is no such kind of store, or its package is not installed.
    """
    if config.run.url is None:
        return Folder(RunFiles(run_directory).checkpoints)
    return Bucket(f"{config.run.url}/pretrain/checkpoints", scratch_folder(config, run_directory) / "fetched")


def newest(root: Path | Storage, config_digest: str, damaged: Callable[[str], None]) -> Checkpoint | None:
    """The newest commit whose digests hold, else the one before it, else None.

    Args:
        root: where the checkpoints are: ``storage(...)``, or a folder.
        config_digest: only commits made with these settings count.
        damaged: told, in one line, about every commit that is passed over.

    Raises:
        InputError: a manifest can't be read, or was written by a newer Siloweave.
        SiloweaveError: the store does not answer.
    """
    place = Folder(root) if isinstance(root, Path) else root
    found = newest_commit(place, UNIT, KIND, config_digest, damaged)
    return None if found is None else Checkpoint(found.directory, int(found.manifest.metadata["step"]), found.manifest)


def steps(root: Storage) -> list[int]:
    """Committed steps, oldest first, whatever settings they were made with; no digest is looked at."""
    return [int(name.removeprefix(f"{UNIT}-")) for name in committed(root, UNIT)]


def check_same_corpus(root: Storage, config_digest: str) -> None:
    """Raises an InputError where the newest commit is of another corpus: it would be passed over, and then pruned.

    The settings are those of the run's directory, so the corpus alone can be another one.
    """
    newest_step = max(steps(root), default=None)
    if newest_step is None:
        return
    manifest = read_commit(root, step_name(newest_step), KIND)
    if manifest is not None and manifest.config_digest != config_digest:
        raise InputError(
            f"{root}: step {newest_step} was trained on another corpus than the one that is prepared now; give another "
            "run.name, or bring back the files that the first was prepared from and run `siloweave prepare` again"
        )


def keep_sealed(engine: Any, key: MasterKey, config_digest: str) -> None:
    """From here on the engine's checkpoint files are encrypted; DeepSpeed's own never touch the disk in the clear.

    Args:
        engine: DeepSpeed's.
        key: the user's key.
        config_digest: of the settings and the corpus: a checkpoint of others is refused, whatever its manifest says.
    """
    import torch

    def save(state_dict: Any, path: str) -> None:
        buffer = io.BytesIO()
        torch.save(state_dict, buffer)
        # Scratch: it need not survive a crash, so it is neither synced nor moved into place.
        Path(path).write_bytes(seal(buffer.getbuffer(), key, f"{config_digest}/{_place(Path(path))}"))

    def load(path: str, map_location: Any = None) -> Any:
        place = _place(Path(path))
        content = read_sealed(Path(path), key, f"{config_digest}/{place}", older=place)
        # A pickle, but one that only somebody with the key can have written.
        return torch.load(io.BytesIO(content), map_location=map_location, weights_only=False)

    engine.checkpoint_engine.save, engine.checkpoint_engine.load = save, load


def read_shard(engine: Any, key: MasterKey | None, path: Path) -> Any:
    """One of DeepSpeed's files in a commit whose digests hold; without a key, only what is touched is read."""
    import torch

    if key is not None:
        return engine.checkpoint_engine.load(str(path), map_location="cpu")
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def _place(path: Path) -> str:
    """One step's shard can't stand in for another's."""
    return f"{path.parent.name}/{path.name}"


def pretrain_digest(config: RunConfig, corpus_digest: str) -> str:
    """Digest of everything that shapes the weights; checkpoints of another one are not continued."""
    return digest_json(
        [
            without_later("model", config.model.model_dump(exclude={"config"})),
            without_later("pretrain", config.pretrain.model_dump(exclude=_NO_WEIGHT_DEPENDS_ON)),
            {name: source.weight for name, source in corpora(config.data).items()},
            config.run.seed,
            corpus_digest,
            *([config_file.digest_of(config.model.config)] if config.model.config else []),
        ]
    )
