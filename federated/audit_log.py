"""A silo's log of everything that came in and left, for its steward: a JSON line each, sizes and digests, no values.

A line is synced before what it tells of goes on: a request is written down before it is looked at, a reply before its
first byte leaves.
"""

import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from configs.artifacts import digest_bytes
from configs.errors import SiloweaveError
from federated.line_file import LineFile
from privacy.limits import DAY_S

_DAY = DAY_S // 60  # in minutes


class UnloggedError(SiloweaveError):
    """The audit log can't be written. Nothing may leave the silo, be it a refusal; what was charged stays charged."""


class AuditLog:
    """``audit.jsonl`` in the silo's state directory."""

    def __init__(self, state_dir: Path) -> None:
        self._lock = threading.Lock()
        self._file = LineFile(state_dir / "audit.jsonl", self._head)
        self._accepted = _accepted(self._file)

    def came_in(self, content: bytes) -> None:
        """A request's envelope has arrived, whatever it is."""
        self._write("in", bytes=len(content), digest=digest_bytes(content))

    def accepted(self, **public: Any) -> int:
        """Its sender is trusted. Returns how many such requests there were within 24 hours, this one included."""
        return self._write("accepted", **public)

    def leaves(self, content: bytes, **public: Any) -> None:
        """A reply's envelope is about to leave."""
        self._write("out", bytes=len(content), digest=digest_bytes(content), **public)

    def _write(self, direction: str, **values: Any) -> int:
        now = round(time.time(), 3)
        with self._lock:
            try:
                self._file.append(json.dumps({"time": now, "direction": direction, **values}))
            except SiloweaveError as error:
                raise UnloggedError(str(error)) from error
            if direction == "accepted":
                self._accepted[int(now // 60)] += 1
            return _within_a_day(self._accepted, now)

    def _head(self) -> str:
        """A fresh file's first line: what the older ones say of the last day, by minute. They may be put elsewhere."""
        return json.dumps({"time": round(time.time(), 3), "direction": "rotated", "accepted": self._accepted})


def _within_a_day(accepted: Counter[int], now: float) -> int:
    """Forgets what is older, and counts the rest; a minute counts until it has passed as a whole."""
    for minute in [minute for minute in accepted if minute < int(now // 60) - _DAY]:
        del accepted[minute]
    return accepted.total()


def _accepted(file: LineFile) -> Counter[int]:
    """Requests of the last day, by minute, from before this start: those since the newest file with a head."""
    counts: Counter[int] = Counter()
    for path in file.newest_first():
        head = False
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                entry = _entry(line)
                if entry.get("direction") == "accepted":
                    counts[int(entry["time"] // 60)] += 1
                elif entry.get("direction") == "rotated":
                    head = True
                    counts.update({int(minute): count for minute, count in entry["accepted"].items()})
        if head:
            break
    _within_a_day(counts, time.time())
    return counts


def _entry(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return {}  # a kill cut it short
    return entry if isinstance(entry, dict) else {}
