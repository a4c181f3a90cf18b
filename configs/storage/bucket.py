"""An object store, through fsspec. Only ``fetch`` and ``get`` put files on this machine's disk."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.errors import InputError, SiloweaveError
from configs.storage.files import write_atomic, write_failure
from configs.storage.manifests import Manifest, damaged_file
from configs.storage.storage import COMMITTED

_LOCAL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # errors of this machine's disk, not of a store


class Bucket:
    """A prefix of an object store. Commits are fetched into a local folder, one at a time.

    Args:
        url: what fsspec understands.
        local: where ``fetch`` puts a commit: a folder of this machine that nobody else uses.

    Raises:
        InputError: fsspec doesn't know the protocol, or its package is not installed.
    """

    def __init__(self, url: str, local: Path) -> None:
        self.url, self.local = url.rstrip("/"), local
        self._fs, self._root = _connect(self.url)

    def __str__(self) -> str:
        return self.url

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _asking(self, name: str) -> Iterator[None]:
        try:
            yield
        except SiloweaveError:
            raise
        except Exception as error:  # every store has errors of its own
            if isinstance(error, OSError) and error.errno in _LOCAL:
                raise write_failure(self.local, error) from error
            raise SiloweaveError(
                f"{self.url}/{name}: the store says {_line(error)}; what was committed before is intact: see to the "
                "store, its space and your permission there, then run the same command again"
            ) from error

    def all_names(self) -> dict[str, int]:
        """Every file below, and its size."""
        with self._asking(""):
            try:
                found = self._fs.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
            start = len(self._root) + 1
            return {name[start:]: int(entry["size"]) for name, entry in found.items() if len(name) > start}

    def children(self) -> dict[str, set[str]]:
        """See ``Storage``."""
        children: dict[str, set[str]] = {}
        for name in self.all_names():
            folder, _, file = name.partition("/")
            if file:
                children.setdefault(folder, set()).add(file)
        return children

    def names(self, folder: str) -> set[str]:
        """See ``Storage``."""
        with self._asking(folder):
            try:
                return {path.rsplit("/", 1)[-1] for path in self._fs.ls(self._path(folder), detail=False)}
            except FileNotFoundError:
                return set()

    def read(self, name: str) -> bytes | None:
        """See ``Storage``."""
        with self._asking(name):
            try:
                return bytes(self._fs.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """See ``Storage``."""
        with self._asking(name):
            self._fs.pipe_file(self._path(name), content)

    def put(self, source: Path, name: str, moved: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """See ``Storage``. fsspec says which parts have arrived.

        Those of s3fs have 50 MiB; a file below 100 MiB is a single part.
        """
        from fsspec.callbacks import Callback

        told = Callback(hooks={"moved": lambda *_, **__: moved()})
        with self._asking(name), source.open("rb") as file:
            entry = {"size_bytes": source.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
            self._fs.put_file(str(source), self._path(name), callback=told)
        moved()  # some stores report no parts
        return entry

    def get(self, name: str, target: Path) -> bool:
        """Copies a file to a local path, whole or not at all. False where the store has none."""
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        with self._asking(name):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._fs.get_file(self._path(name), str(partial))
                partial.replace(target)
            except FileNotFoundError:
                return False
            finally:
                partial.unlink(missing_ok=True)
        return True

    def remove(self, folder: str) -> None:
        """See ``Storage``."""
        with self._asking(folder):
            names = self.names(folder)
            if COMMITTED in names:
                self._fs.rm_file(self._path(f"{folder}/{COMMITTED}"))
            for name in names - {COMMITTED}:
                self._fs.rm_file(self._path(f"{folder}/{name}"))

    def copy(self, name: str, target: "Bucket") -> None:
        """Copies a file to another place of the same store."""
        with self._asking(name):
            self._fs.cp_file(self._path(name), target._path(name))

    def remove_file(self, name: str) -> None:
        """Removes one file."""
        with self._asking(name):
            self._fs.rm_file(self._path(name))

    def fetch(self, folder: str, manifest: Manifest) -> Path:
        """See ``Storage``. What was fetched before is removed, to make room."""
        target, content = self.local / folder, manifest.encode()
        there = target / COMMITTED
        if there.exists() and there.read_bytes() == content and damaged_file(target, manifest) is None:
            return target
        if self.local.is_dir():
            for path in self.local.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in manifest.files:
            self.get(f"{folder}/{name}", target / name)
        write_atomic(there, content)
        return target

    def prove(self) -> None:
        """Writes, reads and removes a file, before anything is done that would be lost.

        Raises:
            InputError: one of them fails; the message has the store's reason.
        """
        name = f".probe-{os.getpid()}-{os.urandom(4).hex()}"
        try:
            self._fs.pipe_file(self._path(name), b"probe")
            if self._fs.cat_file(self._path(name)) != b"probe":
                raise OSError("a file that was just written is not read back")
            self._fs.rm_file(self._path(name))
        except Exception as error:
            raise InputError(
                f"run.storage {self.url!r} can't be written, read and cleaned: {_line(error)}; create the bucket, give "
                "credentials that may do this (the store's own environment variables), or choose another run.storage"
            ) from None


def _line(error: BaseException) -> str:
    """What went wrong, in one line."""
    text = " ".join(str(error).split()) or "no reason"
    return f"{type(error).__name__}: {text[:300]}"


def _connect(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise InputError(
            f"run.storage is {url!r}: {_line(error)}; for s3:// install the extra (pip install 'siloweave[s3]')"
        ) from None
    except ValueError as error:
        raise InputError(
            f"run.storage is {url!r}: {_line(error)}; give a folder, or a URL such as s3://bucket/prefix"
        ) from None
    return fs, str(root).rstrip("/")
