"""The ledger: what one dataset has spent over its life. A silo charges it before it releases anything.

SQLite in WAL mode with full sync. Entries are append-only, numbered, chained by their hashes and signed with the
silo's key. A run reserves its whole schedule first; its rounds only draw on that. Reservations of different runs,
which may be chosen adaptively, add in epsilon and in delta.

Life of one request: ``charge`` stores a fresh seed with the charge, in one transaction; ``release`` stores the reply
and erases the seed, in one transaction; only then may the reply's first byte be sent. So a crash at any instant
repeats the same noise over the same value, or sends the same reply; it never spends twice and never loses a spend.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError, PolicyRefusal, SiloweaveError
from configs.storage.files import digest_bytes
from privacy.ledger.chain import Budget, left, policy_budget, releases, verify_entries
from privacy.ledger.journal import RECONCILE, Journal, default_anchor_dir
from privacy.ledger.kept_replies import gone, too_old
from privacy.ledger.limits import Limits, check_new, under
from privacy.ledger.runs import Run, Runs, named
from privacy.ledger.statements import Receipt, RunStatement
from privacy.mechanism.streams import SEED_BYTES, Streams
from privacy.plan import PlanTerms, PrivacyPlan

SeedSource = Callable[[str], bytes]
NO_LIMITS = Limits()


@dataclass(frozen=True)
class Charge:
    """A charged request: either its seed, to compute the reply with, or the reply that is already stored."""

    number: int
    seed: bytes | None
    reply: bytes | None

    def streams(self, digest: str) -> Streams:
        """The randomness of a reply that is not stored yet, for the request of this digest."""
        if self.seed is None:
            raise SiloweaveError(f"charge {self.number} has neither seed nor reply")
        return Streams(self.seed, digest)


class Ledger:
    """One silo's ledger. Open it with ``Ledger.open``."""

    def __init__(self, journal: Journal, seed_source: SeedSource | None) -> None:
        self.journal, self.path = journal, journal.path
        self._seed_source = seed_source or _operating_system_seed
        self._seed_origin = "injected" if seed_source else "operating system"

    @classmethod
    def open(
        cls,
        state_dir: Path,
        silo_id: str,
        dataset_id: str,
        budget: Budget,
        seed_source: SeedSource | None = None,
        anchor_dir: Path | None = None,
    ) -> "Ledger":
        """Opens, or starts, the ledger of a dataset; a changed policy is recorded as an entry.

        Args:
            state_dir: the silo's own folder.
            silo_id: the silo.
            dataset_id: the steward's name for the dataset.
            budget: the policy in force.
            seed_source: gives the seed of a charge from its request's digest; None draws from the operating system.
            anchor_dir: folder of the anchor; None is ``<state_dir>.anchor``.

        Raises:
            InputError: the file belongs to another dataset or silo, is damaged, is of a newer version, or may be an old
                one that was put back.
        """
        journal = Journal(state_dir, anchor_dir or default_anchor_dir(state_dir), silo_id, dataset_id)
        try:
            with journal.locked():
                # Verified before anything is added: an entry under a wrong key would spoil a sound ledger.
                verify_entries(journal.entries(), str(journal.path), journal.signer.public_key)
                journal.check_owner()
                _refuse_old(journal)
                journal.bind(budget)
            journal.move_anchor()
            journal.scrub()  # a kill may have come between a release and its scrubbing
        except BaseException:
            journal.db.close()
            raise
        return cls(journal, seed_source)

    @property
    def public_key(self) -> str:
        """The key that verifies the entries' signatures."""
        return self.journal.signer.public_key

    def close_file(self) -> None:
        """Closes the database."""
        self.journal.db.close()

    def entries(self) -> list[dict[str, Any]]:
        """All entries, oldest first: {"number", "body", "previous", "hash", "signature"}."""
        return self.journal.entries()

    def accept(self, receipt: Receipt | None) -> None:
        """Looks at the receipt that a coordinator holds, before anything of its request is done: ``Journal.accept``."""
        self.journal.accept(receipt)

    def left(self) -> Budget:
        """What no run has reserved yet."""
        return left(self.journal.bodies())

    def receipt(self, run_id: str, coordinator: str = "") -> Receipt:
        """The present head, with what a run has reserved and what is left."""
        return self.journal.receipt(run_id, coordinator)

    def reservation(self, run_id: str, coordinator: str = "") -> dict[str, Any] | None:
        """The entry with which a run reserved its schedule."""
        run = _reserved(self.journal.bodies(), run_id, coordinator)
        return None if run is None else run.opening

    def bind(self, budget: Budget) -> None:
        """Takes in the policy's budget as it is now, and records a changed one as an entry."""
        if policy_budget(self.journal.bodies()) == budget:
            return
        with self.journal.transaction():
            self.journal.bind(budget)

    def check_room(self, run_id: str, terms: PlanTerms, limits: Limits, coordinator: str = "") -> None:
        """Refuses a new run that would be refused whatever its epsilon is, before that is computed.

        Raises:
            PolicyRefusal: as ``reserve``.
        """
        bodies = self.journal.bodies()
        if Runs(bodies).of(run_id, coordinator) is None:
            check_new(bodies, terms, 0.0, limits, coordinator)

    def reserve(self, run_id: str, plan: PrivacyPlan, limits: Limits = NO_LIMITS, coordinator: str = "") -> Receipt:
        """Commits a run's whole schedule. The same run and plan again change nothing.

        Args:
            run_id: the run.
            plan: what it may ask for.
            limits: what the policy allows beside the budget.
            coordinator: the public key of whoever the run belongs to; empty in a ledger that only its owner asks.

        Raises:
            PolicyRefusal: the run reserved another plan before, the ledger is of another unit, or more is asked for
                than is left, or for today.
        """
        terms = plan.terms
        epsilon = terms.epsilon  # may take seconds, so it is computed before the file is locked
        with self.journal.transaction():
            bodies = self.journal.bodies()
            before = Runs(bodies).of(run_id, coordinator)
            if before is None:
                check_new(bodies, terms, epsilon, limits, coordinator)
                self.journal.append(
                    "reserve",
                    run=run_id,
                    **named(coordinator),
                    **under(limits.study),
                    plan=terms.model_dump(),
                    plan_digest=terms.digest,
                    public_record_count=plan.public_record_count,
                    epsilon=epsilon,
                    delta=terms.delta,
                )
            elif before.opening["kind"] != "reserve":
                raise PolicyRefusal.of("reservation", run_id, "another run", f"run {run_id} was entrusted with updates")
            elif before.opening["plan_digest"] != terms.digest:
                reserved = before.opening["plan_digest"]
                raise PolicyRefusal.of("reservation", terms.digest, reserved, f"run {run_id} reserved another plan")
        return self.receipt(run_id, coordinator)

    def charge(
        self, run_id: str, request_id: str, request_digest: str, number: int, metric: str = "", coordinator: str = ""
    ) -> Charge:
        """Charges one release of a reserved run and draws its seed; the same request again gets the same seed or reply.

        Args:
            run_id: the run.
            request_id: the coordinator's id of this request.
            request_digest: digest of the whole request; the seed is bound to it.
            number: 1 to the plan's rounds, or to its releases of the metric; each can be charged once.
            metric: a metric's name; empty for a round of training.
            coordinator: who asks; see ``reserve``.

        Raises:
            PolicyRefusal: this coordinator's run has no reservation or is closed, the id or the round was used with
                another content, or the plan has no such round.
        """
        what = _what(number, metric)
        with self.journal.transaction():
            charge = self._known(run_id, request_id, request_digest, what, coordinator)
            if charge is None:
                owner = named(coordinator)
                charge = self._new_charge(request_digest, run=run_id, **owner, request=request_id, **what)
        if charge.reply is not None:
            self.journal.scrub()  # it may have failed when the reply was stored, and the seed may still be there
        return charge

    def reply(
        self, run_id: str, request_id: str, request_digest: str, number: int, metric: str = "", coordinator: str = ""
    ) -> bytes | None:
        """The reply that is stored for a request; None where ``charge`` would give a seed. Charges nothing.

        Raises:
            PolicyRefusal: as ``charge``.
        """
        with self.journal.transaction():
            charge = self._known(run_id, request_id, request_digest, _what(number, metric), coordinator)
        if charge is None or charge.reply is None:
            return None
        self.journal.scrub()
        return charge.reply

    def _known(
        self, run_id: str, request_id: str, request_digest: str, what: dict[str, Any], coordinator: str
    ) -> Charge | None:
        """The charge of a request that was charged before; None for one that may be charged now."""
        bodies = self.journal.bodies()
        run = _reserved(bodies, run_id, coordinator)
        if run is None:
            raise PolicyRefusal.of("reservation", run_id, "a reserved run", f"run {run_id} has reserved nothing")
        before = run.charge(request=request_id)
        if before is None:
            _check_release(run, what)
            return None
        if before["digest"] != request_digest:
            raise PolicyRefusal.of(
                "request_id", request_digest, before["digest"], f"request {request_id} was another one"
            )
        return self._stored(before["number"], run, bodies)

    def _new_charge(self, request_digest: str, **values: Any) -> Charge:
        number = self.journal.append("charge", **values, digest=request_digest, seed_source=self._seed_origin)
        seed = self._seed_source(request_digest)
        self.journal.db.execute("INSERT INTO seeds VALUES (?, ?)", (number, seed))
        return Charge(number, seed, None)

    def _stored(self, number: int, run: Run, bodies: list[dict[str, Any]]) -> Charge:
        reply = self.journal.db.execute("SELECT reply FROM replies WHERE charge = ?", (number,)).fetchone()
        if reply is not None:
            return Charge(number, None, reply[0])
        seed = self.journal.db.execute("SELECT seed FROM seeds WHERE charge = ?", (number,)).fetchone()
        if seed is None or run.closing is not None:
            raise gone(run, number, bodies)
        return Charge(number, seed[0], None)

    def release(self, number: int, run_id: str, reply: bytes) -> bytes:
        """Stores a charge's reply and erases its seed; older replies of its run make room.

        Returns:
            The stored reply, which may be sent: another process may have answered the same request before.
        """
        with self.journal.transaction():
            stored = self.journal.db.execute("SELECT reply FROM replies WHERE charge = ?", (number,)).fetchone()
            if stored is None:
                self._store(number, run_id, reply)
        self.journal.scrub()
        return reply if stored is None else bytes(stored[0])

    def _store(self, number: int, run_id: str, reply: bytes) -> None:
        bodies, db = self.journal.bodies(), self.journal.db
        run = next(run for run in Runs(bodies) if run.charge(number=number) is not None)
        if db.execute("SELECT 1 FROM seeds WHERE charge = ?", (number,)).fetchone() is None:
            raise gone(run, number, bodies)
        self.journal.append(
            "release", run=run_id, charge=number, reply_digest=digest_bytes(reply), reply_bytes=len(reply)
        )
        db.execute("INSERT INTO replies VALUES (?, ?)", (number, reply))
        db.execute("DELETE FROM seeds WHERE charge = ?", (number,))
        older = [(charge,) for charge in too_old(run, self.journal.bodies())]
        db.executemany("DELETE FROM replies WHERE charge = ?", older)

    def close(self, run_id: str, coordinator: str = "") -> Receipt:
        """Ends a run: nothing more can be charged to it, its seeds and stored replies are deleted. Refunds nothing."""
        with self.journal.transaction():
            run = Runs(self.journal.bodies()).of(run_id, coordinator)
            if run is not None and run.closing is None:
                self.journal.end(run, coordinator)
        self.journal.scrub()
        return self.receipt(run_id, coordinator)

    def statement(
        self, run_id: str, versions: dict[str, str], *, attests_disjoint_units: bool, coordinator: str = ""
    ) -> RunStatement | None:
        """What this silo states of a closed run, signed; None for a run that has reserved nothing or is open."""
        run = _reserved(self.journal.bodies(), run_id, coordinator)
        if run is None or run.closing is None:
            return None
        reservation, number = run.opening, run.closing["number"]
        return RunStatement(
            silo=self.journal.silo_id,
            dataset=self.journal.dataset_id,
            public_key=self.public_key,
            run=run_id,
            plan_digest=reservation["plan_digest"],
            public_record_count=reservation["public_record_count"],
            epsilon=reservation["epsilon"],
            delta=reservation["delta"],
            rounds_charged=run.rounds_charged,
            number=number,
            head=self.entries()[number - 1]["hash"],
            attests_disjoint_units=attests_disjoint_units,
            seed_source=run.seed_source,
            versions=versions,
            mandate=reservation.get("mandate", ""),
        ).signed(self.journal.signer)


def _reserved(bodies: list[dict[str, Any]], run_id: str, coordinator: str) -> Run | None:
    """A run that reserved a plan; None for one that was entrusted with updates, too."""
    run = Runs(bodies).of(run_id, coordinator)
    return run if run is not None and run.opening["kind"] == "reserve" else None


def _what(number: int, metric: str) -> dict[str, Any]:
    """What a charge is for, as its entry says it."""
    return {"round": 0, "metric": metric, "metric_number": number} if metric else {"round": number}


def _check_release(run: Run, what: dict[str, Any]) -> None:
    if run.closing is not None:
        raise PolicyRefusal.of("closed", run.name, "an open run", run.end)
    metric, number = what.get("metric", ""), what.get("metric_number", what["round"])
    shown, most = f"{metric or 'round'} {number}", releases(run.opening["plan"], metric)
    if not 1 <= number <= most:
        raise PolicyRefusal.of("schedule", shown, f"1 to {most}", f"run {run.name} reserved {most} of them")
    if run.charge(**what) is not None:
        raise PolicyRefusal.of("schedule", shown, "a new one", f"{shown} of {run.name} is charged")


def _refuse_old(journal: Journal) -> None:
    doubt = journal.doubt()
    if doubt is not None:
        raise InputError(
            f"{doubt}; the silo refuses everything until {RECONCILE} has taken in the receipts that coordinators hold"
        )


def _operating_system_seed(_: str) -> bytes:
    return os.urandom(SEED_BYTES)
