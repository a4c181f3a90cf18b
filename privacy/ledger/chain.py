"""A ledger's entries: numbered, chained by hash, signed. Pure functions over them: replay, verify, what is left."""

import json
import sqlite3
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


def read_entries(connection: sqlite3.Connection) -> list[Entry]:
    """All entries of an open ledger file, oldest first."""
    rows = connection.execute("SELECT number, body, previous, hash, signature FROM entries ORDER BY number").fetchall()
    return [dict(zip(("number", "body", "previous", "hash", "signature"), row, strict=True)) for row in rows]


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


def spends(entries: list[Entry]) -> tuple[Spend, ...]:
    """Every spend under its own name: the reservations, and the lost ones that reconciliations took in again."""
    found: list[Spend] = []
    for entry in entries:
        body = json.loads(entry["body"])
        if body["kind"] == "reserve":
            found.append(Spend(entry=entry["hash"], epsilon=body["epsilon"], delta=body["delta"]))
        elif body["kind"] == "reconcile":
            found.extend(Spend(**spend) for spend in body["spends"])
    return tuple(found)


def epoch(entries: list[Entry]) -> int:
    """How often the ledger has been reconciled, counting what receipts of lost branches tell."""
    bodies = (json.loads(entry["body"]) for entry in entries)
    return max((body["epoch"] for body in bodies if body["kind"] == "reconcile"), default=0)


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
    previous, bodies = GENESIS, list[dict[str, Any]]()
    key = public_key
    for position, entry in enumerate(entries, 1):
        body = _body(entry)
        key = key or str(body.get("public_key", ""))
        sound = (
            entry.get("number") == body.get("number") == position
            and entry.get("previous") == previous
            and entry.get("hash") == entry_hash(previous, entry["body"])
            and signature_holds(key, entry["hash"].encode(), str(entry.get("signature")))
        )
        if not sound:
            raise InputError(
                f"{origin}: entry {position} does not hold (number, chain or signature): the ledger was edited or "
                "damaged; put its backup back"
            )
        previous = entry["hash"]
        bodies.append(body)
    return bodies


def _body(entry: Entry) -> dict[str, Any]:
    """An entry's body; an empty one, which holds nowhere, where it was damaged beyond reading."""
    try:
        body = json.loads(entry["body"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}
