"""Committed rounds: ``round-N/`` with the adapter after it and the silos' receipts; ``COMMITTED`` comes last.

What silos have stated after the last round is committed in ``closing-N/``, a new one whenever there is more of it: what
was committed is never written again.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.storage.files import digest_bytes, digest_file, write_failure
from configs.storage.layout import CERTIFICATE, EARLIER_CERTIFICATE
from configs.storage.manifests import Manifest, commit_manifest, damaged_file, read_manifest
from configs.storage.sealing import MasterKey, read_sealed, write_sealed
from configs.storage.storage import COMMITTED, Folder, committed, newest_commit
from privacy.certificate.model_digests import RoundDigests, UpdateDigest

KIND = UNIT = "round"
CLOSING = "closing"
ADAPTER = "adapter.safetensors"
SILOS = "silos.json"
RELEASES = "releases.json"
EARLIER = "earlier.json"
UPDATES = "updates.json"
SERVER_STATE = "server-state.safetensors"


@dataclass(frozen=True)
class Task:
    """What a silo was asked for last, in buffered rounds.

    Attributes:
        round: the silo's own.
        version: after how many server steps the model was that it starts from.
        open: whether its reply is still waited for.
    """

    round: int
    version: int
    open: bool = True


@dataclass(frozen=True)
class Round:
    """A committed round.

    Attributes:
        round_number: 0 is the start.
        adapter: the shared adapter after it.
        silos: what each silo has told of itself, its last receipt among it.
        server_state: what the next round's aggregation continues from, safetensors; empty where it needs nothing.
        releases: digests of what was folded into the adapter in this round, by ledger; None where a version that kept
            none has committed it.
        earlier: digests of the rounds before it, the first one first, so that the newest commit alone is enough for a
            certificate; None where a version that kept none has committed it.
        updates: what was folded into it in buffered rounds, in the order in which it came.
        tasks: what each silo was asked for last then, in buffered rounds.
    """

    round_number: int
    adapter: bytes
    silos: dict[str, dict[str, Any]]
    server_state: bytes = b""
    releases: dict[str, str] | None = field(default_factory=dict)
    earlier: tuple[RoundDigests, ...] | None = ()
    updates: tuple[UpdateDigest, ...] = ()
    tasks: dict[str, Task] = field(default_factory=dict)

    @property
    def digests(self) -> RoundDigests:
        """The round's own."""
        return RoundDigests(adapter=digest_bytes(self.adapter), releases=self.releases, updates=self.updates)


def save(directory: Path, config_digest: str, commit: Round, run_id: str, key: MasterKey | None = None) -> Round:
    """Writes a round and commits it; what is made of weights is encrypted where there is a key.

    Raises:
        SiloweaveError: the disk is full or not writable; earlier rounds are unchanged.
    """
    target = directory / f"round-{commit.round_number:05d}"
    shutil.rmtree(target, ignore_errors=True)
    try:
        target.mkdir(parents=True)
        write_sealed(target / ADAPTER, commit.adapter, key, _context(target, run_id, ADAPTER))
        if commit.server_state:
            write_sealed(target / SERVER_STATE, commit.server_state, key, _context(target, run_id, SERVER_STATE))
        earlier = [one.model_dump(mode="json") for one in commit.earlier or ()]
        for name, value in ((SILOS, commit.silos), (RELEASES, commit.releases), (EARLIER, earlier)):
            _write_json(target / name, value)
        if commit.tasks:
            updates = [one.model_dump(mode="json") for one in commit.updates]
            tasks = {silo: asdict(task) for silo, task in commit.tasks.items()}
            _write_json(target / UPDATES, {"updates": updates, "tasks": tasks})
    except OSError as error:
        raise write_failure(target, error) from error
    metadata = {"round": commit.round_number, "run_id": run_id}
    commit_manifest(target, Manifest(KIND, config_digest, metadata=metadata), name=COMMITTED)
    return commit


def save_closing(directory: Path, config_digest: str, silos: dict[str, dict[str, Any]], run_id: str) -> None:
    """Commits what the silos have told and stated when the rounds were over.

    Raises:
        SiloweaveError: the disk is full or not writable; what was committed before is unchanged.
    """
    numbers = [int(folder.removeprefix(f"{CLOSING}-")) for folder in committed(Folder(directory), CLOSING)]
    target = directory / f"{CLOSING}-{max(numbers, default=0) + 1:05d}"
    shutil.rmtree(target, ignore_errors=True)
    try:
        target.mkdir(parents=True)
        _write_json(target / SILOS, silos)
    except OSError as error:
        raise write_failure(target, error) from error
    commit_manifest(target, Manifest(CLOSING, config_digest, metadata={"run_id": run_id}), name=COMMITTED)


def closing(
    directory: Path, config_digest: str, run_id: str, damaged: Callable[[str], None]
) -> tuple[Path, dict[str, dict[str, Any]]]:
    """What the silos had stated when the run ended an earlier time, and where that is; nothing where it never has.

    Where no commit has it the certificate does: an earlier version of Siloweave made no such commit.

    Raises:
        InputError: there is only a certificate, and it can't be read.
    """
    found = newest_commit(Folder(directory), CLOSING, CLOSING, config_digest, damaged)
    if found is not None and found.manifest.metadata["run_id"] == run_id:
        return found.directory, _json(found.directory / SILOS)
    path = directory / CERTIFICATE
    try:
        document: dict[str, Any] = _json(path) if path.exists() else {"run_id": ""}
        return path, dict(document.get("silos", ())) if document["run_id"] == run_id else {}
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{path}: no certificate that can be read; put its backup back, or delete it") from None


def earlier_certificate(directory: Path) -> str | None:
    """Digest of the certificate of the run that a federation continues; None where it starts from the base model."""
    path = directory / EARLIER_CERTIFICATE
    return digest_file(path) if path.exists() else None


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


def digests(directory: Path, commit: Round, key: MasterKey | None = None) -> tuple[RoundDigests, ...]:
    """Digests of every round from 1 to a committed one.

    Raises:
        InputError: an earlier version has committed it, which kept them with each round alone, and one is missing or
            damaged: nothing says what went into the model.
    """
    if commit.round_number == 0:
        return ()
    earlier = commit.earlier
    if earlier is None:
        earlier = tuple(whole(directory, number, key).digests for number in range(1, commit.round_number))
    return (*earlier, commit.digests)


def whole(directory: Path, number: int, key: MasterKey | None = None) -> Round:
    """One committed round.

    Raises:
        InputError: it is missing or damaged.
    """
    target = directory / f"round-{number:05d}"
    manifest = read_manifest(target, KIND, name=COMMITTED)
    if manifest is None or damaged_file(target, manifest) is not None:
        raise InputError(f"{target}: missing or damaged; put its backup back")
    return _read(target, manifest, key)


def _read(target: Path, manifest: Manifest, key: MasterKey | None) -> Round:
    silos, run_id = _json(target / SILOS), manifest.metadata["run_id"]
    adapter = read_sealed(target / ADAPTER, key, _context(target, run_id, ADAPTER))
    server_state = b""
    if SERVER_STATE in manifest.files:
        server_state = read_sealed(target / SERVER_STATE, key, _context(target, run_id, SERVER_STATE))
    releases = _json(target / RELEASES) if RELEASES in manifest.files else None
    earlier = None
    if EARLIER in manifest.files:
        earlier = tuple(RoundDigests.model_validate(one) for one in _json(target / EARLIER))
    found = _json(target / UPDATES) if UPDATES in manifest.files else {"updates": (), "tasks": {}}
    updates = tuple(UpdateDigest.model_validate(one) for one in found["updates"])
    tasks = {silo: Task(**task) for silo, task in found["tasks"].items()}
    return Round(int(manifest.metadata["round"]), adapter, silos, server_state, releases, earlier, updates, tasks)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True), encoding="utf-8")


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _context(target: Path, run_id: str, name: str) -> str:
    """Binds a sealed file to its place: it can't stand in for another round's, run's, or federation's without DP."""
    return f"{run_id}/{target.parent.name}/{target.name}/{name}"
