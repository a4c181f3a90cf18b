"""A silo's files of lines, for its steward: a line is there whole or not at all, and no file grows without bound."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from configs.errors import SiloweaveError
from configs.parse import refuse_stream
from configs.printing import printable
from configs.storage.files import sync_directory, write_atomic, write_failure
from configs.storage.layout import SiloFiles

LARGEST_BYTES = 16 * 2**20  # of one file
KEPT = 16  # older files
LARGEST_MESSAGE = 2**16  # characters of one message of silo.log, a traceback included
MODE = 0o600


def _no_head() -> str:
    return ""


class LineFile:
    """A file and its older ones, ``NAME.1`` the newest of them; mode 0600. For one thread at a time.

    Args:
        path: the file that is written.
        head: gives the first line of a fresh file; empty: none.
    """

    def __init__(self, path: Path, head: Callable[[], str] = _no_head) -> None:
        self.path, self._head = path, head

    def append(self, line: str, *, sync: bool = True) -> None:
        """Writes one line, and syncs it where it has to survive a crash of the machine.

        Raises:
            SiloweaveError: the disk is full or not writable; nothing of the line is there then.
        """
        content = line.encode(errors="backslashreplace") + b"\n"
        try:
            if self._size() and self._size() + len(content) > LARGEST_BYTES:
                self._rotate()
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, MODE)
            try:
                _append_whole(descriptor, content)
                if sync:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise write_failure(self.path, error) from error

    def newest_first(self) -> Iterator[Path]:
        """The files that are there, each once: a kill in a rotation may have left one under two names."""
        paths = [path for path in (self.path, *map(self._older, range(1, KEPT + 1))) if path.exists()]
        return reversed({path.stat().st_ino: path for path in reversed(paths)}.values())

    def newest(self, size_bytes: int) -> list[str]:
        """The newest whole lines, oldest first, in older files too; at most so many bytes of them are read.

        Raises:
            InputError: one of the files is none.
        """
        found: list[str] = []
        for path in self.newest_first():
            refuse_stream(path, "move it away")
            with path.open("rb") as file:
                start = max(0, file.seek(0, os.SEEK_END) - size_bytes)
                file.seek(start)
                content = file.read(size_bytes)
            lines = content.decode(errors="replace").split("\n")
            found = [line for line in lines[start > 0 :] if line] + found
            size_bytes -= len(content)
            if size_bytes <= 0:
                break
        return found

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def _older(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")

    def _rotate(self) -> None:
        """The new file is written before an old one moves, and takes its place at once: a full disk loses no file."""
        fresh, head = self.path.with_name(f".{self.path.name}.fresh"), self._head()
        write_atomic(fresh, f"{head}\n".encode() if head else b"", MODE)
        for number in range(KEPT - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                self._older(number).replace(self._older(number + 1))
        os.link(self.path, self._older(1))
        fresh.replace(self.path)
        sync_directory(self.path.parent)


def _append_whole(descriptor: int, content: bytes) -> None:
    """A write may stop in the middle, at first without an error: the rest is tried, or all is undone."""
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        content = b"\n" + content  # a kill cut the last line short: it stays a line of its own
    try:
        while content:
            content = content[os.write(descriptor, content) :]
    except OSError:
        os.ftruncate(descriptor, size)
        raise


class PrivateLog(logging.Handler):
    """``silo.log``: what its service says to the steward, strangers' words escaped; a message's further lines indented.

    Where it can't be written it is silent: what it would tell must appear nowhere else.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        path.touch(mode=MODE)
        self._lines = LineFile(path)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one message."""
        with contextlib.suppress(SiloweaveError):
            lines = self.format(record)[:LARGEST_MESSAGE].split("\n")
            self._lines.append("\n    ".join(map(printable, lines)), sync=False)


def private_log(state_dir: Path) -> logging.Logger:
    """The silo's own log, in its state directory; nothing of it is sent."""
    logger = logging.getLogger(f"siloweave.silo.{state_dir}")
    if not logger.handlers:
        logger.addHandler(PrivateLog(SiloFiles(state_dir).log))
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger


def close_log(logger: logging.Logger) -> None:
    """Closes a silo's own log: a process that hosts many silos keeps few files open."""
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
