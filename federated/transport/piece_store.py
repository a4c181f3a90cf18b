"""What has come of a message, on disk: a relay that is started again asks for the rest of it alone.

It holds what the relay sees anyway, requests on their way to the silo, in the relay's own folder. Nobody relies on it:
a piece that is gone, changed or couldn't be written is asked for again.
"""

import contextlib
import logging
import re
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from hashlib import sha256
from pathlib import Path

_NAME = re.compile("[0-9a-f]{64}")
_WORTHWHILE_BYTES = 2**16  # a smaller object comes sooner than it is written
_log = logging.getLogger("siloweave.relay")


class PieceStore:
    """Objects of the message that is under way, each in a file that bears its SHA-256.

    Args:
        folder: is made, for this user alone.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._warned = folder, False
        with self._tolerant():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def keep_only(self, names: AbstractSet[str]) -> None:
        """Removes everything else: what other messages have left."""
        with self._tolerant():
            for path in self._folder.iterdir():
                if path.name not in names:
                    path.unlink()

    def get(self, name: str) -> bytes | None:
        """An object that has come before; None where it has not, or is not what it was."""
        if not _NAME.fullmatch(name):
            return None
        with contextlib.suppress(OSError):
            content = (self._folder / name).read_bytes()
            if sha256(content).hexdigest() == name:
                return content
        return None

    def put(self, name: str, content: bytes) -> None:
        """Keeps an object whose digest was compared with its name. A full disk costs nothing but a second transfer."""
        if len(content) < _WORTHWHILE_BYTES or not _NAME.fullmatch(name):
            return
        part = self._folder / f"{name}.part"
        try:
            with self._tolerant():
                part.touch(mode=0o600)
                part.write_bytes(content)
                part.replace(self._folder / name)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._warned:
                said = f"{self._folder}: pieces can't be kept ({error.strerror}); a restart will fetch them again"
                _log.warning("%s", said)
            self._warned = True
