"""Committed checkpoints: a folder ``step-N`` counts only once ``COMMITTED``, its manifest, is there."""

import io
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.artifacts import Manifest, commit_manifest, damaged_file, read_manifest
from configs.encryption import MasterKey, read_sealed, write_sealed
from configs.errors import SiloweaveError

COMMITTED = "COMMITTED"
KIND = "checkpoint"
_WRITE_ERROR = re.compile("PytorchStreamWriter|inline_container|No space left|File too large")


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose digests hold."""

    directory: Path
    step: int
    manifest: Manifest


def step_name(step: int) -> str:
    """Folder name of a step, so that names sort as numbers do."""
    return f"step-{step:08d}"


def save(engine: Any, root: Path, step: int, config_digest: str, barrier: Callable[[], None], rank: int) -> None:
    """Writes every rank's shards, then rank 0 commits them.

    Raises:
        SiloweaveError: the disk is full or not writable; earlier commits are unchanged.
    """
    directory = root / step_name(step)
    if rank == 0:
        # What a kill left there without COMMITTED is garbage, perhaps of another number of ranks.
        shutil.rmtree(directory, ignore_errors=True)
    barrier()
    try:
        engine.save_checkpoint(str(root), tag=step_name(step), save_latest=False)
    except (OSError, RuntimeError) as error:
        # torch reports a failed write as RuntimeError; a rank that died shows as one, too, and is not the disk's fault.
        if isinstance(error, RuntimeError) and not _WRITE_ERROR.search(str(error)):
            raise
        raise SiloweaveError(
            f"{directory}: the checkpoint could not be written ({str(error).splitlines()[0]}); the commit before it is "
            "intact: free some space or choose another run.storage, then run the same command again"
        ) from error
    barrier()
    if rank == 0:
        metadata = {"step": step, "world_size": engine.world_size}
        commit_manifest(directory, Manifest(KIND, config_digest, metadata=metadata), name=COMMITTED)


def keep_sealed(engine: Any, key: MasterKey) -> None:
    """From here on the engine's checkpoint files are encrypted; DeepSpeed's own never touch the disk in the clear."""
    import torch

    def save(state_dict: Any, path: str) -> None:
        buffer = io.BytesIO()
        torch.save(state_dict, buffer)
        write_sealed(Path(path), buffer.getbuffer(), key, _context(Path(path)))

    def load(path: str, map_location: Any = None) -> Any:
        content = read_sealed(Path(path), key, _context(Path(path)))
        # A pickle, but one that only somebody with the key can have written.
        return torch.load(io.BytesIO(content), map_location=map_location, weights_only=False)

    engine.checkpoint_engine.save, engine.checkpoint_engine.load = save, load


def read_shard(engine: Any, key: MasterKey | None, path: Path) -> Any:
    """One of DeepSpeed's files in a commit whose digests hold; without a key, only what is touched is read."""
    import torch

    if key is not None:
        return engine.checkpoint_engine.load(str(path), map_location="cpu")
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def _context(path: Path) -> str:
    """One step's shard can't stand in for another's."""
    return f"{path.parent.name}/{path.name}"


def newest(root: Path, config_digest: str, damaged: Callable[[str], None]) -> Checkpoint | None:
    """The newest commit whose digests hold, else the one before it, else None.

    Args:
        root: folder of the checkpoints.
        config_digest: only commits made with these settings count.
        damaged: told, in one line, about every commit that is passed over.
    """
    for directory in sorted(root.glob("step-*"), reverse=True):
        manifest = read_manifest(directory, KIND, name=COMMITTED)
        if manifest is None or manifest.config_digest != config_digest:
            continue
        broken = damaged_file(directory, manifest)
        if broken is None:
            return Checkpoint(directory, int(manifest.metadata["step"]), manifest)
        damaged(f"{directory / broken}: its digest doesn't hold; going back to the commit before")
    return None


def prune(root: Path, keep: int) -> None:
    """Removes all but the newest ``keep`` commits, and what was never committed before the newest."""
    committed = sorted(path.parent for path in root.glob(f"step-*/{COMMITTED}"))
    for directory in committed[:-keep]:
        # The manifest goes first, so that a kill in between leaves garbage and not a damaged commit.
        (directory / COMMITTED).unlink()
        shutil.rmtree(directory)
    for directory in root.glob("step-*"):
        if directory < committed[-1] and not (directory / COMMITTED).exists():
            shutil.rmtree(directory)
