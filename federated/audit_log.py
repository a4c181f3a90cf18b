"""A silo's log of everything that came in and left, for its steward: a JSON line each, sizes and digests, no values.

A line is synced before what it tells of goes on: a request is written down before it is looked at, a reply before its
first byte leaves.
"""

import json
import os
import time
from collections import deque
from pathlib import Path
from typing import Any

from configs.artifacts import digest_bytes, write_failure
from privacy.limits import DAY_S


class AuditLog:
    """``audit.jsonl`` in the silo's state directory, mode 0600."""

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / "audit.jsonl"
        self._accepted = deque(_accepted(self.path))

    def came_in(self, content: bytes) -> None:
        """A request's envelope has arrived, whatever it is."""
        self._write(direction="in", bytes=len(content), digest=digest_bytes(content))

    def accepted(self, **public: Any) -> int:
        """Its sender is trusted. Returns how many such requests there were within 24 hours, this one included."""
        now = self._write(direction="accepted", **public)
        self._accepted.append(now)
        while self._accepted[0] < now - DAY_S:
            self._accepted.popleft()
        return len(self._accepted)

    def leaves(self, content: bytes, **public: Any) -> None:
        """A reply's envelope is about to leave."""
        self._write(direction="out", bytes=len(content), digest=digest_bytes(content), **public)

    def _write(self, **values: Any) -> float:
        now = round(time.time(), 3)
        line = json.dumps({"time": now, **values}) + "\n"
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(descriptor, line.encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise write_failure(self.path, error) from error
        return now


def _accepted(path: Path) -> list[float]:
    """Times of the requests of the last day, from before this start."""
    if not path.exists():
        return []
    since, times = time.time() - DAY_S, list[float]()
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # a kill cut it short
            if entry["direction"] == "accepted" and entry["time"] >= since:
                times.append(entry["time"])
    return times
