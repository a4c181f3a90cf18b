"""A ledger's entries: numbered, chained by hash, signed. Pure functions over them: replay, verify, what is left."""

import json
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from configs.errors import InputError
from configs.storage.files import digest_bytes
from privacy.ledger.statements import Spend
from privacy.signing import signature_holds

GENESIS = "0" * 64
Entry = dict[str, Any]
SPENDING = ("reserve", "reconcile")  # kinds of entries that carry epsilon and delta which were spent


@dataclass(frozen=True)
class Budget:
    """Epsilon and delta that a dataset may ever spend, or has left."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class History:
    """The entries of a ledger at one moment, oldest first, and what they say.

    Attributes:
        entries: {"number", "body", "previous", "hash", "signature"} each.
        bodies: the decoded ``body`` of each.
    """

    entries: list[Entry]
    bodies: list[dict[str, Any]]

    @classmethod
    def of(cls, entries: list[Entry]) -> "History":
        """The history that these entries make."""
        return cls(entries, [json.loads(entry["body"]) for entry in entries])

    @property
    def spends(self) -> tuple[Spend, ...]:
        """Every spend under its own name: the reservations, and the lost ones that reconciliations took in again."""
        found: list[Spend] = []
        for entry, body in zip(self.entries, self.bodies, strict=True):
            if body["kind"] == "reserve":
                found.append(Spend(entry=entry["hash"], epsilon=body["epsilon"], delta=body["delta"]))
            elif body["kind"] == "reconcile":
                found.extend(Spend(**spend) for spend in body["spends"])
        return tuple(found)

    @property
    def epoch(self) -> int:
        """How often the ledger has been reconciled, counting what receipts of lost branches tell."""
        return max((body["epoch"] for body in self.bodies if body["kind"] == "reconcile"), default=0)


class Reader:
    """Reads an open ledger file: each entry once, and then what was added since.

    Entries are never changed or deleted, and each one's hash stands for all before it. So as long as the last one that
    was read is in the file as it was, all before it are; where it isn't (an append was rolled back, or the file itself
    was), everything is read anew.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()
        self._known = History([], [])

    def read(self) -> History:
        """The entries that are there now. Callers share the bodies, and must not change them."""
        with self._lock:
            known, last = self._known, self._known.entries[-1:]
            found = read_entries(self._connection, last[0]["number"] if last else 1)
            if last and found[:1] != last:
                known, last, found = History([], []), [], read_entries(self._connection)
            new = History.of(found[len(last) :])
            self._known = History(known.entries + new.entries, known.bodies + new.bodies)
            return self._known


def read_entries(connection: sqlite3.Connection, first: int = 1) -> list[Entry]:
    """The entries of an open ledger file from a number on, oldest first."""
    return list(each_entry(connection, first))


def each_entry(connection: sqlite3.Connection, first: int = 1) -> Iterator[Entry]:
    """The same one by one: those before a place where the file is damaged are read."""
    columns = ("number", "body", "previous", "hash", "signature")
    rows = connection.execute(
        "SELECT number, body, previous, hash, signature FROM entries WHERE number >= ? ORDER BY number", (first,)
    )
    for row in rows:
        yield dict(zip(columns, row, strict=True))


def entry_hash(previous: str, body: str) -> str:
    """Hash of an entry: over the hash before it and its own body."""
    return digest_bytes(f"{previous}\n{body}".encode())


def find(bodies: list[dict[str, Any]], kind: str, **values: Any) -> dict[str, Any] | None:
    """The first entry of a kind with these values."""
    matching = (
        body
        for body in bodies
        if body["kind"] == kind and all(body.get(name) == value for name, value in values.items())
    )
    return next(matching, None)


def releases(plan: dict[str, Any], metric: str) -> int:
    """How often a reserved plan releases a metric; without a name, its rounds of training."""
    if not metric:
        return int(plan["rounds"])
    return sum(found["releases"] for found in plan.get("metric_releases", ()) if found["name"] == metric)


def policy_budget(bodies: list[dict[str, Any]]) -> Budget:
    """The budget of the policy in force."""
    policy = [body for body in bodies if body["kind"] in ("open", "policy")][-1]
    return Budget(policy["epsilon"], policy["delta"])


def left(bodies: list[dict[str, Any]]) -> Budget:
    """The policy's budget less all that was spent, which adds in epsilon and in delta."""
    policy, spending = policy_budget(bodies), [body for body in bodies if body["kind"] in SPENDING]
    return Budget(
        policy.epsilon - sum(body["epsilon"] for body in spending),
        policy.delta - sum(body["delta"] for body in spending),
    )


def spent_since(bodies: list[dict[str, Any]], since: float) -> float:
    """Epsilon of what was spent at or after a time, in seconds since 1970, by the entries' own signed times.

    Times never go back in a chain: an entry written under a clock that was set back is as late as the one before it.
    """
    latest, total = 0.0, 0.0
    for body in bodies:
        latest = max(latest, body["time"])
        if body["kind"] in SPENDING and latest >= since:
            total += body["epsilon"]
    return total


def verify_entries(entries: list[Entry], origin: str, public_key: str | None = None) -> list[dict[str, Any]]:
    """Replays numbers, chain and signatures.

    Args:
        entries: as ``Ledger.entries`` gives them.
        origin: file name, for the message.
        public_key: the silo's key; None trusts the one in the first entry.

    Returns:
        The entries' bodies.

    Raises:
        InputError: the first entry that doesn't hold.
    """
    bodies = holding(entries, public_key)
    if len(bodies) < len(entries):
        raise InputError(
            f"{origin}: entry {len(bodies) + 1} does not hold (number, chain or signature): the ledger was edited or "
            "damaged; put its backup back"
        )
    return bodies


def holding(entries: list[Entry], public_key: str | None = None) -> list[dict[str, Any]]:
    """Bodies of the entries from the first one to the last before one that doesn't hold; see ``verify_entries``."""
    previous, bodies = GENESIS, list[dict[str, Any]]()
    key = public_key
    for position, entry in enumerate(entries, 1):
        body = body_of(entry)
        key = key or str(body.get("public_key", ""))
        sound = (
            entry.get("number") == body.get("number") == position
            and entry.get("previous") == previous
            and entry.get("hash") == entry_hash(previous, entry["body"])
            and signature_holds(key, entry["hash"].encode(), str(entry.get("signature")))
        )
        if not sound:
            break
        previous = entry["hash"]
        bodies.append(body)
    return bodies


def body_of(entry: Entry) -> dict[str, Any]:
    """An entry's body; an empty one, which holds nowhere, where it was damaged beyond reading."""
    try:
        entry["body"].encode()  # half a surrogate has no bytes, and so no hash
        body = json.loads(entry["body"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}
