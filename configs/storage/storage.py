"""Where a run's files last: a folder, or an object store that fsspec knows (``s3://bucket/prefix`` and the like).

A commit is a child folder whose ``COMMITTED``, its manifest, was written last: object stores have no rename, and a
folder without it is garbage. What ``write`` and ``put`` have returned from survives a crash.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from configs.storage.files import sync_directory, write_atomic, write_failure
from configs.storage.manifests import Manifest, damaged_file, parse_manifest

COMMITTED = "COMMITTED"
_CHUNK_BYTES, _SYNC_BYTES = 2**20, 2**28


class Storage(Protocol):
    """Files below one place, in child folders; names are ``folder/file``, with slashes."""

    def children(self) -> dict[str, set[str]]:
        """Names of the child folders, and of the files in each."""

    def names(self, folder: str) -> set[str]:
        """Names of the files in one child folder."""

    def read(self, name: str) -> bytes | None:
        """A small file's content; None where there is none."""

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file: readers see all of it or nothing."""

    def put(self, source: Path, name: str, moved: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Copies a local file, and calls ``moved`` as parts of it arrive. Returns its entry in a manifest."""

    def remove(self, folder: str) -> None:
        """Removes a child folder, ``COMMITTED`` first: a kill in between leaves garbage, not a damaged commit."""

    def fetch(self, folder: str, manifest: Manifest) -> Path:
        """A local folder with a commit's files, as far as they are there."""


class Folder:
    """A folder of this machine, or one that nodes share."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def children(self) -> dict[str, set[str]]:
        """See ``Storage``."""
        if not self.root.is_dir():
            return {}
        return {path.name: self.names(path.name) for path in self.root.iterdir() if path.is_dir()}

    def names(self, folder: str) -> set[str]:
        """See ``Storage``. A listing, since network file systems remember for a while that a file was not there."""
        try:
            return set(os.listdir(self.root / folder))  # noqa: PTH208
        except FileNotFoundError:
            return set()

    def read(self, name: str) -> bytes | None:
        """See ``Storage``."""
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """See ``Storage``."""
        self._make_parent(name)
        write_atomic(self.root / name, content)

    def put(self, source: Path, name: str, moved: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """See ``Storage``. The file's name lasts with the next ``write`` beside it."""
        self._make_parent(name)
        target, digest, size = self.root / name, hashlib.sha256(), 0
        try:
            with source.open("rb") as reading, target.open("wb") as writing:
                while chunk := reading.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    writing.write(chunk)
                    size += len(chunk)
                    if size % _SYNC_BYTES == 0:  # else the sync at the end may be so long that it seems to hang
                        writing.flush()
                        os.fsync(writing.fileno())
                    moved()
                writing.flush()
                os.fsync(writing.fileno())
        except OSError as error:
            raise write_failure(target, error) from error
        return {"size_bytes": size, "sha256": digest.hexdigest()}

    def _make_parent(self, name: str) -> None:
        parent = (self.root / name).parent
        try:
            if not parent.is_dir():
                parent.mkdir(parents=True, exist_ok=True)
                sync_directory(parent.parent)
        except OSError as error:
            raise write_failure(parent, error) from error

    def remove(self, folder: str) -> None:
        """See ``Storage``."""
        try:
            if (self.root / folder / COMMITTED).exists():
                (self.root / folder / COMMITTED).unlink()
                sync_directory(self.root / folder)
            if (self.root / folder).is_dir():
                shutil.rmtree(self.root / folder)
        except OSError as error:
            raise write_failure(self.root / folder, error) from error

    def fetch(self, folder: str, manifest: Manifest) -> Path:  # noqa: ARG002
        """See ``Storage``."""
        return self.root / folder


class Commit(NamedTuple):
    """A commit whose digests hold."""

    directory: Path
    manifest: Manifest


def newest_commit(
    storage: Storage, unit: str, kind: str, config_digest: str, damaged: Callable[[str], None]
) -> Commit | None:
    """The newest commit whose digests hold, else the one before it, else None.

    Args:
        storage: holds the commits.
        unit: what is counted: folders are ``unit-NUMBER``, and sort as they were made.
        kind: what the manifests say they are.
        config_digest: only commits made with these settings count.
        damaged: told, in one line, about every commit that is passed over.

    Raises:
        InputError: a manifest can't be read, or was written by a newer Siloweave.
        SiloweaveError: the store does not answer.
    """
    for folder in reversed(committed(storage, unit)):
        manifest = read_commit(storage, folder, kind)
        if manifest is None or manifest.config_digest != config_digest:
            continue
        directory = storage.fetch(folder, manifest)
        broken = damaged_file(directory, manifest)
        if broken is None:
            return Commit(directory, manifest)
        damaged(f"{storage}/{folder}/{broken}: its digest doesn't hold; going back to the commit before")
    return None


def committed(storage: Storage, unit: str) -> list[str]:
    """Folders that hold a commit, oldest first."""
    return sorted(
        folder for folder, files in storage.children().items() if _counts(folder, unit) and COMMITTED in files
    )


def _counts(folder: str, unit: str) -> bool:
    return re.fullmatch(rf"{unit}-\d+", folder) is not None


def read_commit(storage: Storage, folder: str, kind: str) -> Manifest | None:
    """The manifest of one commit; None where there is none.

    Raises:
        InputError: it can't be read, is of another kind, or was written by a newer Siloweave.
    """
    content = storage.read(f"{folder}/{COMMITTED}")
    return None if content is None else parse_manifest(content, f"{storage}/{folder}", COMMITTED, kind)


def prune(storage: Storage, unit: str, keep: int) -> None:
    """Removes all but the newest ``keep`` commits, and what was never committed before the newest."""
    children = {folder: files for folder, files in storage.children().items() if _counts(folder, unit)}
    done = sorted(folder for folder, files in children.items() if COMMITTED in files)
    garbage = sorted(folder for folder in children.keys() - set(done) if done and folder < done[-1])
    for folder in [*done[:-keep], *garbage]:
        storage.remove(folder)
