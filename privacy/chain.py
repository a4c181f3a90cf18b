"""A ledger's entries: numbered, chained by hash, signed. Pure functions over them: replay, verify, what is left."""

import json
import sqlite3
from dataclasses import dataclass
from typing import Any

from configs.artifacts import digest_bytes
from configs.errors import InputError
from privacy.signing import signature_holds

GENESIS = "0" * 64


@dataclass(frozen=True)
class Budget:
    """Epsilon and delta that a dataset may ever spend, or has left."""

    epsilon: float
    delta: float


def read_entries(connection: sqlite3.Connection) -> list[dict[str, Any]]:
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


def policy_budget(bodies: list[dict[str, Any]]) -> Budget:
    """The budget of the policy in force."""
    policy = [body for body in bodies if body["kind"] in ("open", "policy")][-1]
    return Budget(policy["epsilon"], policy["delta"])


def left(bodies: list[dict[str, Any]]) -> Budget:
    """The policy's budget less all reservations, which add in epsilon and in delta."""
    policy = policy_budget(bodies)
    reservations = [body for body in bodies if body["kind"] == "reserve"]
    return Budget(
        policy.epsilon - sum(body["epsilon"] for body in reservations),
        policy.delta - sum(body["delta"] for body in reservations),
    )


def verify_entries(entries: list[dict[str, Any]], origin: str, public_key: str | None = None) -> list[dict[str, Any]]:
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
    previous, bodies = GENESIS, []
    for position, entry in enumerate(entries, 1):
        body = json.loads(entry["body"])
        key = public_key or json.loads(entries[0]["body"]).get("public_key", "")
        sound = (
            entry["number"] == body["number"] == position
            and entry["previous"] == previous
            and entry["hash"] == entry_hash(previous, entry["body"])
            and signature_holds(key, entry["hash"].encode(), entry["signature"])
        )
        if not sound:
            raise InputError(
                f"{origin}: entry {position} does not hold (number, chain or signature): the ledger was edited or "
                "damaged; put its backup back"
            )
        previous = entry["hash"]
        bodies.append(body)
    return bodies
