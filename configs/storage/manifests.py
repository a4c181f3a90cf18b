"""How stages hand over: directories with a manifest, digests, and writes that never leave half a file.

A directory is complete when its manifest is there, because the manifest is written last and atomically.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.parse import refuse_stream
from configs.storage.files import digest_file, digest_json, sync_tree, unreadable, write_atomic, write_failure
from configs.storage.layout import FEDERATED

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """What a directory holds and what it was made from.

    Attributes:
        kind: what the directory is, for instance ``corpus`` or ``model``.
        config_digest: digest of the settings that shaped the content.
        inputs: digests of what it was made from, by name.
        files: relative path -> {"size_bytes", "sha256"}.
        metadata: facts about the content, for people and for the report.
    """

    kind: str
    config_digest: str
    inputs: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    version: int = MANIFEST_VERSION
    creator: str = field(default_factory=lambda: f"siloweave {version('siloweave')}")

    @property
    def content_digest(self) -> str:
        """One digest for all files of the directory."""
        return digest_json({name: entry["sha256"] for name, entry in self.files.items()})

    @classmethod
    def decode(cls, content: bytes) -> "Manifest":
        """A manifest that ``encode`` made."""
        return cls(**json.loads(content))

    def encode(self) -> bytes:
        """The manifest's file."""
        return json.dumps(asdict(self), indent=2, sort_keys=True).encode() + b"\n"


def describe_files(directory: Path, exclude: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Sizes and digests of all files below a directory, by relative path."""
    skipped = set(exclude)
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        name: {"size_bytes": path.stat().st_size, "sha256": digest_file(path)}
        for path in paths
        if (name := path.relative_to(directory).as_posix()) not in skipped
    }


def commit_manifest(directory: Path, manifest: Manifest, name: str = MANIFEST) -> Manifest:
    """Makes the directory's files durable, digests them, and writes the manifest last.

    Returns:
        The manifest with its ``files`` filled in.
    """
    try:
        sync_tree(directory)
    except OSError as error:
        raise write_failure(directory, error) from error
    complete = Manifest(**{**asdict(manifest), "files": describe_files(directory, exclude=[name])})
    write_atomic(directory / name, complete.encode())
    return complete


def read_manifest(directory: Path, kind: str, name: str = MANIFEST) -> Manifest | None:
    """The manifest of a complete directory, or None where there is none.

    Raises:
        InputError: the manifest can't be read, is of another kind, or was written by a newer Siloweave.
    """
    path = directory / name
    refuse_stream(path, "put the manifest's backup there")
    return parse_manifest(path.read_bytes(), str(directory), name, kind) if path.exists() else None


def parse_manifest(content: bytes, directory: str, name: str, kind: str) -> Manifest:
    """A manifest from its file's content; ``directory`` and ``name`` are for the message.

    Raises:
        InputError: see ``read_manifest``.
    """
    path = f"{directory}/{name}"
    try:
        fields = json.loads(content)
        found = fields.get("version") if isinstance(fields, dict) else None
        if type(found) is int and found > MANIFEST_VERSION:  # before its fields, which may be others
            raise InputError(
                f"{path}: version {found} is newer than this Siloweave reads ({MANIFEST_VERSION}); upgrade Siloweave"
            )
        manifest = Manifest(**fields)
        _check_types(manifest)
    except InputError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not a readable manifest ({error}); delete {directory} to make it again") from None
    if manifest.kind != kind:
        raise InputError(f"{path}: kind is {manifest.kind!r}, expected {kind!r}; give the directory of a {kind}")
    return manifest


def _check_types(manifest: Manifest) -> None:
    """Raises a TypeError where a field of a manifest that came from elsewhere is of another type than in ours."""
    entries = manifest.files.values() if isinstance(manifest.files, dict) else [None]
    listed = all(
        isinstance(entry, dict) and isinstance(entry.get("size_bytes"), int) and isinstance(entry.get("sha256"), str)
        for entry in entries
    )
    if not listed or type(manifest.version) is not int or not isinstance(manifest.metadata, dict):
        raise TypeError("a field of another type")


def damaged_file(directory: Path, manifest: Manifest) -> str | None:
    """The first file that doesn't hold what the manifest says, or None when all do."""
    for name, entry in manifest.files.items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != entry["size_bytes"] or digest_file(path) != entry["sha256"]:
            return name
    return None


def require_manifest(directory: Path, kind: str, made_by: str) -> Manifest:
    """The manifest of a directory that must be complete and undamaged.

    Args:
        directory: where to look.
        kind: what must lie there.
        made_by: the command that makes it, named in the error.

    Raises:
        InputError: it is not there, a file of it may not be read, or does not hold what the manifest says.
    """
    try:
        manifest = read_manifest(directory, kind)
        damaged = damaged_file(directory, manifest) if manifest is not None else None
    except PermissionError as error:
        raise InputError(unreadable(Path(error.filename or directory))) from None
    if manifest is None:
        raise InputError(f"{directory}: no finished {kind} here; run `siloweave {made_by}` first")
    if damaged is not None:
        again = f"delete {directory} and run `siloweave {made_by}` again"
        if kind == FEDERATED:
            again = "put the backup of that file back; to federate again would take its privacy budget a second time"
        raise InputError(f"{directory / damaged}: its digest is not the manifest's; {again}")
    return manifest


def finished(directory: Path, kind: str, config_digest: str) -> Manifest | None:
    """The manifest of a directory that is complete, undamaged and made with these settings; else None."""
    manifest = read_manifest(directory, kind)
    if manifest is None or manifest.config_digest != config_digest or damaged_file(directory, manifest):
        return None
    return manifest
