"""Ports for servers that are told theirs: nobody else gets one between its choice and its use."""

import fcntl
import os
import socket
import tempfile
from pathlib import Path
from typing import IO

# Below what Linux gives to whoever asks for any port (32768 and more), and above what Ray gives its workers.
_PORTS = range(20_000, 32_000)
_LOCKS = Path(tempfile.gettempdir()) / f"siloweave-test-ports-{os.getuid()}"
_held: list[IO[str]] = []  # for as long as this process lives: no other test's process on this machine gets them


def free_port() -> int:
    """A port that nobody listens on, and that no other process of tests is given while this one lives."""
    _LOCKS.mkdir(exist_ok=True)
    for port in _PORTS:
        lock = (_LOCKS / str(port)).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            lock.close()
            continue
        _held.append(lock)
        return port
    raise OSError(f"every port of {_PORTS} is taken")
