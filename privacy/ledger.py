"""The ledger: what one dataset has spent over its life. A silo charges it before it releases anything.

SQLite in WAL mode with full sync. Entries are append-only, numbered, chained by their hashes and signed with the
silo's key. A run reserves its whole schedule first; its rounds only draw on that. Reservations of different runs,
which may be chosen adaptively, add in epsilon and in delta.

Life of one request: ``charge`` stores a fresh seed with the charge, in one transaction; ``release`` stores the reply
and erases the seed, in one transaction; only then may the reply's first byte be sent. So a crash at any instant
repeats the same noise over the same value, or sends the same reply; it never spends twice and never loses a spend.
"""

import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.artifacts import canonical_json, digest_bytes
from configs.errors import InputError, PolicyRefusal, SiloweaveError
from privacy.chain import GENESIS, Budget, entry_hash, find, left, policy_budget, read_entries, verify_entries
from privacy.ledger_file import LEDGER_FILE, connect, explain
from privacy.plan import PrivacyPlan
from privacy.signing import Signer
from privacy.streams import SEED_BYTES

SeedSource = Callable[[str], bytes]


@dataclass(frozen=True)
class Receipt:
    """What a silo shows for an entry: its place in the chain and what is left. Public."""

    number: int
    head: str
    epsilon_reserved: float
    epsilon_left: float
    delta_left: float


@dataclass(frozen=True)
class Charge:
    """A charged request: either its seed, to compute the reply with, or the reply that is already stored."""

    number: int
    seed: bytes | None
    reply: bytes | None


class Ledger:
    """One silo's ledger. Open it with ``Ledger.open``."""

    def __init__(self, path: Path, signer: Signer, seed_source: SeedSource) -> None:
        self.path, self._signer, self._seed_source = path, signer, seed_source
        self._db = connect(path)

    @classmethod
    def open(
        cls,
        state_dir: Path,
        silo_id: str,
        dataset_id: str,
        budget: Budget,
        seed_source: SeedSource | None = None,
    ) -> "Ledger":
        """Opens, or starts, the ledger of a dataset; a changed policy is recorded as an entry.

        Args:
            state_dir: the silo's own folder.
            silo_id: the silo.
            dataset_id: the steward's name for the dataset.
            budget: the policy in force.
            seed_source: gives the seed of a charge from its request's digest; None draws from the operating system.

        Raises:
            InputError: the file belongs to another dataset or silo, is damaged, or is of a newer version.
        """
        state_dir.mkdir(parents=True, exist_ok=True)
        state_dir.chmod(0o700)
        path, key = state_dir / LEDGER_FILE, state_dir / "silo.key"
        if path.exists() and not key.exists():
            raise InputError(f"{key}: the key that signed {path} is missing; put its backup back")
        ledger = cls(path, Signer(key), seed_source or _operating_system_seed)
        with ledger._transaction():
            # Verified before anything is added: an entry under a wrong key would spoil a sound ledger.
            verify_entries(ledger.entries(), str(path), ledger.public_key)
            ledger._bind(silo_id, dataset_id, budget)
        ledger._scrub()  # a kill may have come between a release and its scrubbing
        return ledger

    def _bind(self, silo_id: str, dataset_id: str, budget: Budget) -> None:
        opening = next((entry for entry in self._bodies() if entry["kind"] == "open"), None)
        if opening is None:
            key = self._signer.public_key
            self._append("open", silo=silo_id, dataset=dataset_id, public_key=key, **asdict(budget))
        elif (opening["silo"], opening["dataset"]) != (silo_id, dataset_id):
            raise InputError(
                f"{self.path}: the ledger of silo {opening['silo']!r} and dataset {opening['dataset']!r}, not of "
                f"{silo_id!r} and {dataset_id!r}; give each dataset a state_dir of its own"
            )
        elif policy_budget(self._bodies()) != budget:
            self._append("policy", **asdict(budget))

    @property
    def public_key(self) -> str:
        """The key that verifies the entries' signatures."""
        return self._signer.public_key

    def close_file(self) -> None:
        """Closes the database."""
        self._db.close()

    # Entries

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """One atomic step, alone among all processes; a write that fails leaves nothing behind."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.DatabaseError as error:
            raise explain(self.path, error) from error

    def _append(self, kind: str, **values: Any) -> int:
        last = self._db.execute("SELECT number, hash FROM entries ORDER BY number DESC LIMIT 1").fetchone()
        number, previous = (last[0] + 1, last[1]) if last else (1, GENESIS)
        body = canonical_json({"kind": kind, "number": number, "time": round(time.time(), 3), **values}).decode()
        digest = entry_hash(previous, body)
        row = (number, body, previous, digest, self._signer.sign(digest.encode()))
        self._db.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", row)
        return number

    def entries(self) -> list[dict[str, Any]]:
        """All entries, oldest first: {"number", "body", "previous", "hash", "signature"}."""
        return read_entries(self._db)

    def _bodies(self) -> list[dict[str, Any]]:
        return [json.loads(row[0]) for row in self._db.execute("SELECT body FROM entries ORDER BY number")]

    def left(self) -> Budget:
        """What no run has reserved yet."""
        return left(self._bodies())

    def receipt(self, run_id: str) -> Receipt:
        """The present head, with what a run has reserved and what is left."""
        bodies = self._bodies()
        remaining = left(bodies)
        reservation = find(bodies, "reserve", run=run_id)
        number, head = self._db.execute("SELECT number, hash FROM entries ORDER BY number DESC LIMIT 1").fetchone()
        reserved = reservation["epsilon"] if reservation else 0.0
        return Receipt(number, head, reserved, remaining.epsilon, remaining.delta)

    # A run

    def reservation(self, run_id: str) -> dict[str, Any] | None:
        """The entry with which a run reserved its schedule."""
        return find(self._bodies(), "reserve", run=run_id)

    def reserve(self, run_id: str, plan: PrivacyPlan) -> Receipt:
        """Commits a run's whole schedule. The same run and plan again change nothing.

        Raises:
            PolicyRefusal: the run reserved another plan before, or more is asked for than is left.
        """
        request = plan.request
        with self._transaction():
            bodies = self._bodies()
            before = find(bodies, "reserve", run=run_id)
            if before is None:
                _check_left(left(bodies), request.epsilon, request.delta)
                self._append(
                    "reserve",
                    run=run_id,
                    plan=request.model_dump(),
                    plan_digest=request.digest,
                    public_record_count=plan.public_record_count,
                    epsilon=request.epsilon,
                    delta=request.delta,
                )
            elif before["plan_digest"] != request.digest:
                raise _refusal(
                    "reservation", request.digest, before["plan_digest"], f"run {run_id} reserved another plan"
                )
        return self.receipt(run_id)

    def charge(self, run_id: str, request_id: str, request_digest: str, round_number: int) -> Charge:
        """Charges one round of a reserved run and draws its seed; the same request again gets the same seed or reply.

        Args:
            run_id: the run.
            request_id: the coordinator's id of this request.
            request_digest: digest of the whole request; the seed is bound to it.
            round_number: 1 to the plan's rounds; each can be charged once.

        Raises:
            PolicyRefusal: no reservation, closed, used id or round with another content, or no such round in the plan.
        """
        with self._transaction():
            bodies = self._bodies()
            before = find(bodies, "charge", run=run_id, request=request_id)
            if before is not None:
                if before["digest"] != request_digest:
                    raise _refusal(
                        "request_id", request_digest, before["digest"], f"request {request_id} was another one"
                    )
                return self._stored(before["number"], run_id, bodies)
            self._check_round(bodies, run_id, round_number)
            number = self._append("charge", run=run_id, request=request_id, digest=request_digest, round=round_number)
            seed = self._seed_source(request_digest)
            self._db.execute("INSERT INTO seeds VALUES (?, ?)", (number, seed))
        return Charge(number, seed, None)

    def _check_round(self, bodies: list[dict[str, Any]], run_id: str, round_number: int) -> None:
        reservation = find(bodies, "reserve", run=run_id)
        if reservation is None:
            raise _refusal("reservation", run_id, "a reserved run", f"run {run_id} has reserved nothing")
        if find(bodies, "close", run=run_id) is not None:
            raise _refusal("closed", run_id, "an open run", f"run {run_id} is closed")
        rounds = reservation["plan"]["rounds"]
        if not 1 <= round_number <= rounds:
            raise _refusal("schedule", str(round_number), f"1 to {rounds}", f"run {run_id} reserved {rounds} rounds")
        if find(bodies, "charge", run=run_id, round=round_number) is not None:
            raise _refusal("schedule", str(round_number), "a new round", f"round {round_number} of {run_id} is charged")

    def _stored(self, number: int, run_id: str, bodies: list[dict[str, Any]]) -> Charge:
        reply = self._db.execute("SELECT reply FROM replies WHERE charge = ?", (number,)).fetchone()
        if reply is not None:
            return Charge(number, None, reply[0])
        seed = self._db.execute("SELECT seed FROM seeds WHERE charge = ?", (number,)).fetchone()
        if seed is None or find(bodies, "close", run=run_id) is not None:
            raise _refusal("closed", run_id, "an open run", f"run {run_id} is closed and its replies are deleted")
        return Charge(number, seed[0], None)

    def release(self, number: int, run_id: str, reply: bytes) -> bytes:
        """Stores a charge's reply and erases its seed.

        Returns:
            The stored reply, which may be sent: another process may have answered the same request before.
        """
        with self._transaction():
            stored = self._db.execute("SELECT reply FROM replies WHERE charge = ?", (number,)).fetchone()
            if stored is not None:
                return bytes(stored[0])
            if self._db.execute("SELECT 1 FROM seeds WHERE charge = ?", (number,)).fetchone() is None:
                raise _refusal("closed", run_id, "an open run", f"run {run_id} was closed before this reply was stored")
            self._append("release", run=run_id, charge=number, reply_digest=digest_bytes(reply), reply_bytes=len(reply))
            self._db.execute("INSERT INTO replies VALUES (?, ?)", (number, reply))
            self._db.execute("DELETE FROM seeds WHERE charge = ?", (number,))
        self._scrub()
        return reply

    def close(self, run_id: str) -> Receipt:
        """Ends a run: nothing more can be charged to it, its seeds and stored replies are deleted. Refunds nothing."""
        with self._transaction():
            bodies = self._bodies()
            if find(bodies, "reserve", run=run_id) is not None and find(bodies, "close", run=run_id) is None:
                self._append("close", run=run_id)
                charges = [entry["number"] for entry in bodies if entry["kind"] == "charge" and entry["run"] == run_id]
                for table in ("seeds", "replies"):
                    self._db.executemany(f"DELETE FROM {table} WHERE charge = ?", [(n,) for n in charges])  # noqa: S608
        self._scrub()
        return self.receipt(run_id)

    def _scrub(self) -> None:
        """Moves the write-ahead log into the file and empties it: a deleted seed must not linger there."""
        busy, *_ = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise SiloweaveError(
                f"{self.path}: another program reads it, and so an erased seed can't be overwritten; end that program, "
                "then ask again"
            )


def _operating_system_seed(_: str) -> bytes:
    return os.urandom(SEED_BYTES)


def _check_left(remaining: Budget, epsilon: float, delta: float) -> None:
    for name, asked, there in (("epsilon", epsilon, remaining.epsilon), ("delta", delta, remaining.delta)):
        if asked > there * (1 + 1e-12):
            raise PolicyRefusal(
                f"budget_{name}: the run needs {name} {asked:.4g} and this dataset has {max(there, 0):.4g} left; "
                f"lower privacy.{name}, or ask the steward to raise the budget",
                rule=f"budget_{name}",
                asked=f"{asked:.6g}",
                allowed=f"{max(there, 0):.6g}",
            )


def _refusal(rule: str, asked: str, allowed: str, message: str) -> PolicyRefusal:
    return PolicyRefusal(f"{rule}: {message}", rule=rule, asked=asked, allowed=allowed)
