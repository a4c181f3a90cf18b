"""File locks that die with their process, and a run's own: one command at a time writes to a run."""

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import IO

import psutil

from configs.errors import InputError
from configs.storage.files import write_failure
from configs.storage.layout import RunFiles

# File systems that many machines share, and whose locks may hold on one of them alone: by type, and by mount option.
_UNSURE_TYPES = ("fuse", "9p", "virtiofs", "cifs", "smb")
_UNSURE_OPTIONS = {"nolock", "local_lock=flock", "local_lock=all", "localflock"}
_ASK_AGAIN_S = 0.2
_mine: set[Path] = set()  # runs that this process works on: its stages, one inside the other, are no second command


class HeldError(Exception):
    """Another process holds the lock.

    Attributes:
        note: what that process wrote of itself.
    """

    def __init__(self, note: bytes) -> None:
        super().__init__(note)
        self.note = note


@contextmanager
def locked(path: Path, note: bytes, *, wait: bool = False) -> Iterator[None]:
    """Holds a file's lock. The kernel lets go of it when the process ends, however that is.

    Args:
        path: the lock's file; there while it is held, and after a process that was killed.
        note: says who holds it, for ``note_of_holder``.
        wait: for whoever holds it now.

    Raises:
        HeldError: another process holds it, and we don't wait.
        InputError: the file system has no locks.
        SiloweaveError: the file can't be written.
    """
    with _taken(path, wait=wait) as file:
        file.truncate(0)
        file.write(note)
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            fcntl.flock(file, fcntl.LOCK_UN)  # a fork of this process that lives on would hold it, too


def _taken(path: Path, *, wait: bool) -> IO[bytes]:
    """The file, once the lock is ours."""
    while True:
        try:
            file = path.open("a+b")
        except OSError as error:
            raise write_failure(path, error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _lies_at(path, file):
                return file
            file.close()
        except BlockingIOError:
            file.seek(0)
            with file:
                raise HeldError(file.read()) from None
        except OSError as error:
            file.close()
            raise InputError(
                f"{path}: its file system has no working locks ({error.strerror}), so that nothing would keep two "
                "commands apart; choose a folder on another one, or have it mounted with locks"
            ) from None


def _lies_at(path: Path, file: IO[bytes]) -> bool:
    """Whether others would open this file: one that its last holder has removed since keeps nobody out."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def note_of_holder(path: Path) -> bytes | None:
    """What the process that holds a lock wrote of itself; None where none does."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return file.read()
    return None


@dataclass(frozen=True)
class _Holder:
    """A command at work on a run.

    Attributes:
        host: its machine.
        pid: its process there.
        command: its words, without options.
        since: when it began, in that machine's time.
    """

    host: str
    pid: int
    command: str
    since: str

    @classmethod
    def here(cls) -> "_Holder":
        words = takewhile(lambda word: not word.startswith("-"), sys.argv[1:])
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        return cls(socket.gethostname(), os.getpid(), " ".join(["siloweave", *words])[:100], since)

    @classmethod
    def read(cls, note: bytes) -> "_Holder | None":
        try:
            return cls(**json.loads(note))
        except (ValueError, TypeError):
            return None  # it has not written yet, or was cut short

    def __str__(self) -> str:
        return f"`{self.command}` (process {self.pid} on {self.host}), since {self.since}"


@contextmanager
def working_on(directory: Path, patience_s: float = 0.0) -> Iterator[None]:
    """Works on a run's directory alone among all commands that write there; those that only look need no lock.

    Args:
        directory: the run's.
        patience_s: how long to wait for one that is at work on it, and may be about to end.

    Raises:
        InputError: another command is at work on it, or whether one is can't be told.
        SiloweaveError: the folder above it can't be written.
    """
    if directory in _mine:
        yield
        return
    path = RunFiles(directory).lock
    made = list(takewhile(lambda folder: not folder.exists(), path.parents))
    _make(path.parent)
    _refuse_unknown(directory, path)
    with ExitStack() as stack:
        stack.callback(_remove_empty, made)
        deadline = time.monotonic() + patience_s
        while directory not in _mine:
            try:
                stack.enter_context(locked(path, json.dumps(asdict(_Holder.here())).encode()))
                _mine.add(directory)
            except HeldError as held:
                if time.monotonic() >= deadline:
                    raise InputError(
                        f"{directory}: {_Holder.read(held.note) or 'another command'}, is at work on it; wait for it "
                        "or end it, then run the same command again"
                    ) from None
                time.sleep(_ASK_AGAIN_S)
                _make(path.parent)  # the other may have removed what it had made
        stack.callback(_mine.discard, directory)
        yield


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_failure(folder, error) from error


def _remove_empty(folders: list[Path]) -> None:
    """A command that has done nothing leaves nothing."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _refuse_unknown(directory: Path, path: Path) -> None:
    """Where a lock is seen on one machine alone, another machine's command that left no word may still be running."""
    left, kind = _Holder.read(path.read_bytes()) if path.exists() else None, _unsure(path)
    if left is not None and kind and left.host != socket.gethostname():
        raise InputError(
            f"{directory}: {left}, was at work on it and has not said that it ended; locks of this file system "
            f"({kind}) may not reach other machines, so that nothing here can tell: once it has ended, delete {path} "
            "and run the same command again"
        )


def _unsure(path: Path) -> str:
    """The file system's type, where its locks may hold on one machine alone; else nothing."""
    where = path.resolve()
    mounts = [mount for mount in psutil.disk_partitions(all=True) if where.is_relative_to(mount.mountpoint)]
    # Of two on one place, the later one covers the earlier.
    mount = max(reversed(mounts), key=lambda mount: len(mount.mountpoint), default=None)
    if mount is None:
        return ""
    unsure = mount.fstype.startswith(_UNSURE_TYPES) or _UNSURE_OPTIONS & set(mount.opts.split(","))
    return str(mount.fstype) if unsure else ""
