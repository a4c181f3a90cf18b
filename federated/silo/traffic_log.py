"""A silo's logs of all that came in and left, for its steward: one JSON line per message, of sizes and digests.

A line holds no values, and is synced before what it tells of goes on: a coordinator's request is written down before it
is acted on, a reply before its first byte leaves. What was not accepted (no trusted coordinator has signed it, it has
expired, or it is more than a coordinator may send in a day) has a file of its own: files are rotated by size, so
whoever reaches the silo could otherwise push out what tells of real requests.
"""

import json
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from configs.errors import PolicyRefusal, SiloweaveError
from configs.storage.files import digest_bytes
from configs.storage.layout import SiloFiles
from federated.silo.line_file import LineFile
from privacy.ledger.limits import DAY_S

_DAY = DAY_S // 60  # in minutes
_NOBODY = ""  # whose requests were counted before coordinators were told apart: they count against each
_Counts = defaultdict[str, Counter[int]]  # requests by coordinator and minute


class UnloggedError(SiloweaveError):
    """The traffic log can't be written. Nothing may leave the silo, not even a refusal; what is charged stays so."""


class TrafficLog:
    """``audit.jsonl`` in the silo's state directory, and ``strangers.jsonl`` beside it."""

    def __init__(self, state_dir: Path) -> None:
        self._lock = threading.Lock()
        self._file = LineFile(SiloFiles(state_dir).traffic, self._head)
        self._strangers = LineFile(SiloFiles(state_dir).strangers)
        self._accepted = _accepted(self._file)

    def accepted(self, content: bytes, coordinator: str, most: int, **public: Any) -> int:
        """A request's envelope has arrived, and a trusted coordinator has signed it.

        Args:
            content: the envelope.
            coordinator: its public key.
            most: requests that it may send within 24 hours. One more is not accepted: a request that is sent over and
                over, by whoever has once seen it, would push out the lines of all others.
            public: what else the line says.

        Returns:
            How many it has sent within 24 hours, this one included.

        Raises:
            PolicyRefusal: it has sent as many.
        """
        with self._lock:
            _forget(self._accepted, time.time())
            sent = sum(self._accepted[who].total() for who in {_NOBODY, coordinator} & self._accepted.keys())
            if sent >= most:
                raise PolicyRefusal.of("max_requests_per_day", f"{sent + 1}", f"{most}")
            now = _append(self._file, "accepted", content, coordinator=coordinator, **public)
            self._accepted[coordinator][int(now // 60)] += 1
            return sent + 1

    def leaves(self, reply: bytes, **public: Any) -> None:
        """The envelope of a reply to an accepted request is about to leave."""
        with self._lock:
            _append(self._file, "out", reply, **public)

    def turned_away(self, content: bytes, reply: bytes, **public: Any) -> None:
        """An envelope has arrived, whatever it is, that was not accepted; its reply's envelope is about to leave."""
        with self._lock:
            _append(self._strangers, "in", content)
            _append(self._strangers, "out", reply, **public)

    def _head(self) -> str:
        """A fresh file's first line: what the older ones say of the last day, since those may be moved elsewhere."""
        return json.dumps({"time": round(time.time(), 3), "direction": "rotated", "accepted": self._accepted})


def _append(file: LineFile, direction: str, envelope: bytes, **public: Any) -> float:
    now = round(time.time(), 3)
    line = {"time": now, "direction": direction, "bytes": len(envelope), "digest": digest_bytes(envelope), **public}
    try:
        file.append(json.dumps(line))
    except SiloweaveError as error:
        raise UnloggedError(str(error)) from error
    return now


def _forget(accepted: _Counts, now: float) -> None:
    """Forgets what is older than a day; a minute counts until it has passed as a whole."""
    for who, minutes in list(accepted.items()):
        for minute in [minute for minute in minutes if minute < int(now // 60) - _DAY]:
            del minutes[minute]
        if not minutes:
            del accepted[who]


def _accepted(file: LineFile) -> _Counts:
    """Requests of the last day, from before this start: those since the newest file with a head."""
    counts: _Counts = defaultdict(Counter)
    for path in file.newest_first():
        head = False
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                entry = _entry(line)
                if entry.get("direction") == "accepted":
                    counts[entry.get("coordinator", _NOBODY)][int(entry["time"] // 60)] += 1
                elif entry.get("direction") == "rotated":
                    head = True
                    for who, minutes in _by_coordinator(entry["accepted"]).items():
                        counts[who].update({int(minute): count for minute, count in minutes.items()})
        if head:
            break
    _forget(counts, time.time())
    return counts


def _by_coordinator(head: dict[str, Any]) -> dict[str, dict[str, int]]:
    """A head's counts. Older heads have one count a minute, for all coordinators together."""
    return {_NOBODY: head} if all(isinstance(count, int) for count in head.values()) else head


def _entry(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return {}  # a kill cut it short
    return entry if isinstance(entry, dict) else {}
