"""Files that are there whole or not at all, and the digests of what is in them."""

import hashlib
import json
import os
import pwd
import tempfile
from collections.abc import Callable
from pathlib import Path

from configs.errors import SiloweaveError

_NAME_KEPT = 50  # characters, of four bytes at most


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys and no spaces: equal values have equal bytes, and so equal digests."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def digest_bytes(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def digest_json(value: object) -> str:
    """SHA-256 of the canonical JSON."""
    return digest_bytes(canonical_json(value))


def digest_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(directory: Path) -> None:
    """Makes the names in a directory durable (fsync of the directory itself)."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(directory: Path) -> None:
    """Makes every file below a directory, and their names, durable."""
    for folder, _, files in os.walk(directory):
        for name in files:
            handle = os.open(Path(folder) / name, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_directory(Path(folder))


def write_atomic(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part of it.

    Raises:
        SiloweaveError: the disk is full or not writable; what was there before is unchanged.
    """
    try:
        _write(path, content, mode, Path.replace)
    except OSError as error:
        raise write_failure(path, error) from error


def write_new(path: Path, content: bytes, mode: int) -> None:
    """Writes a file, whole or not at all, where there is none; of several writers at once, one wins.

    Raises:
        FileExistsError: something is there, and is unchanged.
        SiloweaveError: the disk is full or not writable.
    """
    try:
        _write(path, content, mode, os.link)  # unlike a rename it never replaces what is there
    except FileExistsError:
        raise
    except OSError as error:
        raise write_failure(path, error) from error


def _write(path: Path, content: bytes, mode: int, put: Callable[[Path, Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The beginning alone: a name may be as long as the file system takes, and this one is longer.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:_NAME_KEPT]}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(mode)
        put(Path(name), path)
        sync_directory(path.parent)
    finally:
        Path(name).unlink(missing_ok=True)


def write_failure(path: Path, error: OSError) -> SiloweaveError:
    """The one line for a write that failed."""
    return SiloweaveError(
        f"{path}: could not be written ({error.strerror or error}); what was committed before is intact: "
        "free some space or choose another run.storage, then run the same command again"
    )


def unreadable(path: Path) -> str:
    """The one line for a file, or a folder above it, that this process may not read."""
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's user need not have a name
        user = str(os.geteuid())
    return f"{path}: user {user} may not read it; give that user the right to read it and to enter the folders above it"
