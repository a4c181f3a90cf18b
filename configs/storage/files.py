"""Files that are there whole or not at all, and the digests of what is in them."""

import errno
import hashlib
import json
import os
import pwd
import resource
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import InputError, SiloweaveError

_OWNERS, _NAME_SHOWN = 0o700, 40  # characters, of four bytes at most
_REMEDIES = {
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some of this user's space, have the quota raised, or choose another place",
    errno.EFBIG: "raise the limit of a file's size (`ulimit -f`), or choose another place",
    errno.EROFS: "choose another place, or have its file system mounted for writing",
    errno.ENAMETOOLONG: "choose a shorter name: most file systems take 255 bytes for a name, 4,095 for a path",
    errno.EISDIR: "a folder is there; move it away, or choose another place",
    errno.ENOTDIR: "what is above it is no folder; move that away, or choose another place",
    errno.EEXIST: "something else is there; move it away, or choose another place",
    errno.ELOOP: "links there lead in a circle; mend them, or choose another place",
}


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
    # Not tempfile's, which would need a chmod: so the mode is the umask's where that is stricter. Its name is no longer
    # than a name that fits the file system.
    fresh = path.with_name(f".{path.name[:_NAME_SHOWN]}.{secrets.token_hex(8)}")
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        put(fresh, path)
        sync_directory(path.parent)
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to be filled, which becomes the target at the end of the context; else nothing is left of it.

    Raises:
        SiloweaveError: the disk is full or not writable.
    """
    part = target.with_name(f".{target.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        part.rename(target)
    except OSError as error:
        raise write_failure(target, error) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def private_folder(path: Path) -> Path:
    """A folder that is its owner's alone, made where it is missing. One that was open to others is closed to them.

    Raises:
        InputError: it can't be made, or is another user's.
    """
    try:
        path.mkdir(mode=_OWNERS, parents=True, exist_ok=True)
        if path.stat().st_mode & 0o777 != _OWNERS:
            path.chmod(_OWNERS)
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: can't be made a folder of your own ({reason}); choose another place") from None
    return path


def write_failure(path: Path, error: OSError) -> SiloweaveError:
    """The one line for a write that failed: what stood in its way, and what helps against just that."""
    return SiloweaveError(
        f"{path}: could not be written ({error.strerror or error}); what was committed before is intact: "
        f"{_remedy(error)}, then run the same command again"
    )


def _remedy(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"let user {_user()} write there, or choose another place"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"raise the limit of open files (`ulimit -n`, {most} now)"
    return _REMEDIES.get(error.errno or 0, "look after that, or choose another place")


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's user need not have a name
        return str(os.geteuid())


def unreadable(path: Path) -> str:
    """The one line for a file, or a folder above it, that this process may not read."""
    return (
        f"{path}: user {_user()} may not read it; give that user the right to read it and to enter the folders above it"
    )
