"""Committed rounds: ``round-N/`` with the adapter after it and the silos' receipts; ``COMMITTED`` comes last."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.artifacts import Manifest, commit_manifest, damaged_file, read_manifest, write_failure
from configs.encryption import MasterKey, read_sealed, write_sealed
from configs.storage import COMMITTED, Folder, newest_commit

KIND = UNIT = "round"
ADAPTER = "adapter.safetensors"
SILOS = "silos.json"
SERVER_STATE = "server-state.safetensors"


@dataclass(frozen=True)
class Round:
    """A committed round.

    Attributes:
        round_number: 0 is the start.
        adapter: the shared adapter after it.
        silos: what each silo has told of itself, its last receipt among it.
        server_state: what the next round's aggregation continues from, safetensors; empty where it needs nothing.
    """

    round_number: int
    adapter: bytes
    silos: dict[str, dict[str, Any]]
    server_state: bytes = b""


def save(
    directory: Path,
    config_digest: str,
    round_number: int,
    adapter: bytes,
    silos: dict[str, Any],
    run_id: str,
    key: MasterKey | None = None,
    server_state: bytes = b"",
) -> Round:
    """Writes a round and commits it; what is made of weights is encrypted where there is a key.

    Raises:
        SiloweaveError: the disk is full or not writable; earlier rounds are unchanged.
    """
    target = directory / f"round-{round_number:05d}"
    shutil.rmtree(target, ignore_errors=True)
    try:
        target.mkdir(parents=True)
        write_sealed(target / ADAPTER, adapter, key, _context(target, run_id, ADAPTER))
        if server_state:
            write_sealed(target / SERVER_STATE, server_state, key, _context(target, run_id, SERVER_STATE))
        (target / SILOS).write_text(json.dumps(silos, indent=2, sort_keys=True), encoding="utf-8")
    except OSError as error:
        raise write_failure(target, error) from error
    metadata = {"round": round_number, "run_id": run_id}
    commit_manifest(target, Manifest(KIND, config_digest, metadata=metadata), name=COMMITTED)
    return Round(round_number, adapter, silos, server_state)


def newest(
    directory: Path, config_digest: str, damaged: Callable[[str], None], key: MasterKey | None = None
) -> Round | None:
    """The newest round whose digests hold, else the one before it, else None.

    Raises:
        InputError: it was not written with this key.
    """
    found = newest_commit(Folder(directory), UNIT, KIND, config_digest, damaged)
    return None if found is None else _read(found.directory, found.manifest, key)


def all_rounds(directory: Path, key: MasterKey | None = None) -> list[Round]:
    """Every committed round, oldest first; round 0 is the start.

    Raises:
        InputError: a round was not written with this key.
    """
    found = []
    for target in sorted(directory.glob("round-*")):
        manifest = read_manifest(target, KIND, name=COMMITTED)
        if manifest is not None and damaged_file(target, manifest) is None:
            found.append(_read(target, manifest, key))
    return found


def _read(target: Path, manifest: Manifest, key: MasterKey | None) -> Round:
    silos, run_id = json.loads((target / SILOS).read_text(encoding="utf-8")), manifest.metadata["run_id"]
    adapter = read_sealed(target / ADAPTER, key, _context(target, run_id, ADAPTER))
    server_state = b""
    if SERVER_STATE in manifest.files:
        server_state = read_sealed(target / SERVER_STATE, key, _context(target, run_id, SERVER_STATE))
    return Round(int(manifest.metadata["round"]), adapter, silos, server_state)


def _context(target: Path, run_id: str, name: str) -> str:
    """One round's file can't stand in for another's, nor for one of the federation without DP or of another run."""
    return f"{run_id}/{target.parent.name}/{target.name}/{name}"
