"""A ledger's file and its anchor as one thing: entries are appended, signed, committed, and then anchored.

Order of writes: the transaction commits first, the anchor follows before anything may leave the silo. A crash between
the two leaves a file that is ahead of its anchor, which is sound: the anchor's head is in the chain and is moved on. An
anchor ahead of its file never comes from a crash.
"""

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.errors import InputError, PolicyRefusal, SiloweaveError
from configs.storage.files import canonical_json, private_folder
from configs.storage.layout import SiloFiles
from privacy.ledger.anchor import Anchor, against
from privacy.ledger.chain import (
    GENESIS,
    Budget,
    Entry,
    History,
    Reader,
    entry_hash,
    find,
    left,
    policy_budget,
)
from privacy.ledger.file import (
    ANCHORED,
    SCHEMA_VERSION,
    connect,
    empty_write_ahead_log,
    explain,
    set_version,
    version_of,
)
from privacy.ledger.runs import Run, Runs, named
from privacy.ledger.statements import Receipt
from privacy.signing import Signer

RECONCILE = "`siloweave silo budget reconcile`"


class Journal:
    """The entries of one silo and dataset.

    Args:
        state_dir: the silo's own folder, made where it is missing.
        anchor_dir: folder of the anchor.
        silo_id: the silo.
        dataset_id: the steward's name for the dataset.

    Raises:
        InputError: the signing key is missing, or the file is damaged or of a newer version.
    """

    def __init__(self, state_dir: Path, anchor_dir: Path, silo_id: str, dataset_id: str) -> None:
        files = SiloFiles(private_folder(state_dir))
        self.path, key = files.ledger, files.key
        if self.path.exists() and not key.exists():
            raise InputError(f"{key}: the key that signed {self.path} is missing; put its backup back")
        self.signer, self.anchor = Signer(key), Anchor(anchor_dir)
        self.silo_id, self.dataset_id = silo_id, dataset_id
        self.db = connect(self.path)
        self._reader = Reader(self.db)

    # Transactions

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One atomic step, alone among all processes; a write that fails leaves nothing behind."""
        try:
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.db.execute("COMMIT")
            except BaseException:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
                raise
        except sqlite3.DatabaseError as error:
            raise explain(self.path, error) from error

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """An atomic step of a ledger that is not in doubt, anchored before it returns.

        Raises:
            PolicyRefusal: the anchor, or a receipt that was shown, is ahead of the file.
        """
        with self.locked():
            self.refuse_doubt()
            yield
        self.move_anchor()

    def append(self, kind: str, **values: Any) -> int:
        """Adds a signed entry. Its time is never before that of the last one, whatever the clock says."""
        last = self.db.execute("SELECT number, hash, body FROM entries ORDER BY number DESC LIMIT 1").fetchone()
        number, previous = (last[0] + 1, last[1]) if last else (1, GENESIS)
        at = self.now(json.loads(last[2])["time"] if last else 0.0)
        body = canonical_json({"kind": kind, "number": number, "time": at, **values}).decode()
        digest = entry_hash(previous, body)
        row = (number, body, previous, digest, self.signer.sign(digest.encode()))
        self.db.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", row)
        return number

    @staticmethod
    def now(latest: float) -> float:
        """Seconds since 1970, never before the latest time that was signed."""
        return max(round(time.time(), 3), latest)

    def check_owner(self) -> None:
        """Raises an InputError where the file, or the anchor, is of another silo or dataset."""
        opening = find(self.bodies(), "open")
        if opening is not None and (opening["silo"], opening["dataset"]) != (self.silo_id, self.dataset_id):
            raise InputError(
                f"{self.path}: is the ledger of silo {opening['silo']!r} and dataset {opening['dataset']!r}, not of "
                f"{self.silo_id!r} and {self.dataset_id!r}; give each dataset a state_dir of its own"
            )
        for receipt in self.anchored()[0]:
            if not self.is_own(receipt):
                raise InputError(
                    f"{self.anchor.path}: is the anchor of silo {receipt.silo!r} and dataset {receipt.dataset!r}; give "
                    "each dataset an anchor_dir of its own"
                )

    def bind(self, budget: Budget) -> None:
        """Opens the chain for its silo and dataset, and records a changed policy as an entry."""
        bodies = self.bodies()
        if not bodies:
            key = self.signer.public_key
            self.append("open", silo=self.silo_id, dataset=self.dataset_id, public_key=key, **asdict(budget))
        elif policy_budget(bodies) != budget:
            self.append("policy", **asdict(budget))

    def history(self) -> History:
        """All entries and what they say, at one moment: another process may append between two looks."""
        return self._reader.read()

    def entries(self) -> list[Entry]:
        """All entries, oldest first."""
        return self.history().entries

    def bodies(self) -> list[dict[str, Any]]:
        """What the entries say, oldest first."""
        return self.history().bodies

    # Against rollback

    def receipt(self, run_id: str = "", coordinator: str = "") -> Receipt:
        """The present head, signed, with what a coordinator's run has reserved and what is left."""
        history = self.history()
        entries, bodies = history.entries, history.bodies
        remaining, run = left(bodies), Runs(bodies).of(run_id, coordinator)
        opening = run.opening if run is not None else {}
        reservation = opening if opening.get("kind") == "reserve" else {}
        return Receipt(
            silo=self.silo_id,
            dataset=self.dataset_id,
            public_key=self.signer.public_key,
            run=run_id,
            number=len(entries),
            head=entries[-1]["hash"],
            epoch=history.epoch,
            plan_digest=(opening if "mandate" in opening else reservation).get("plan_digest", ""),
            public_record_count=reservation.get("public_record_count", 0),
            epsilon_reserved=reservation.get("epsilon", 0.0),
            delta_reserved=reservation.get("delta", 0.0),
            epsilon_left=remaining.epsilon,
            delta_left=remaining.delta,
            mandate=opening.get("mandate", ""),
            spends=history.spends,
        ).signed(self.signer)

    def is_own(self, receipt: Receipt) -> bool:
        """Whether a receipt is of this silo and dataset."""
        return (receipt.silo, receipt.dataset) == (self.silo_id, self.dataset_id)

    def doubt(self) -> str | None:
        """Why the file may be an old one, in words for the steward; None where anchor and file agree."""
        owner = (self.silo_id, self.dataset_id, self.signer.public_key)
        # Until its first anchor is written a file says so by its version: a crash before that is no doubt.
        return self.anchor.doubt(self.path, owner, self.history, expected=version_of(self.db) >= ANCHORED)

    def refuse_doubt(self) -> None:
        """Raises a PolicyRefusal where anchor and file disagree. Its words leave the silo, so they name no path."""
        if self.doubt() is not None:
            raise PolicyRefusal.of(
                "rollback", "a request", "none", f"the silo's ledger is in doubt; its steward runs {RECONCILE}"
            )

    def accept(self, receipt: Receipt | None) -> None:
        """Looks at the receipt that a coordinator holds. One ahead of the file puts the ledger in doubt for good.

        Args:
            receipt: None where the coordinator holds none.

        Raises:
            PolicyRefusal: the ledger is in doubt; or the receipt is of another silo or was not signed by this one. Such
                a receipt is refused rather than ignored, since a coordinator that has none sends none; it leaves no
                mark, since anyone can make one.
        """
        with self.locked():
            self.refuse_doubt()
            if receipt is None:
                return
            if not self.is_own(receipt) or receipt.public_key != self.signer.public_key or not receipt.holds():
                raise PolicyRefusal.of(
                    "receipt", "a receipt that this silo did not sign", "its own", "not this silo's receipt"
                )
            if against(receipt, self.history()) is not None:
                self.anchor.write([self.receipt(), receipt])
                self.refuse_doubt()

    def move_anchor(self) -> None:
        """Anchors the present head, under the file's lock, so that a newer anchor is never replaced by an older one."""
        with self.locked():
            self.refuse_doubt()
            self.write_anchor()

    def write_anchor(self) -> None:
        """Writes the present head to the anchor, whatever stood there."""
        present = [self.receipt()]
        if self.anchored()[0] != present:
            self.anchor.write(present)
        if version_of(self.db) < SCHEMA_VERSION:
            set_version(self.db, SCHEMA_VERSION)

    def anchored(self) -> tuple[list[Receipt], str]:
        """The anchor's receipts, and whether it is "sound", "missing" or "damaged"; a damaged one proves nothing."""
        try:
            found = self.anchor.read()
        except InputError:
            return [], "damaged"
        return found or [], "missing" if found is None else "sound"

    def scrub(self) -> None:
        """Empties the write-ahead log: a deleted seed must not linger there."""
        try:
            emptied = empty_write_ahead_log(self.db)
        except sqlite3.DatabaseError as error:
            raise explain(self.path, error) from error
        if not emptied:
            raise SiloweaveError(
                f"{self.path}: another program reads it, and so an erased seed can't be overwritten; end that program, "
                "then ask again"
            )

    def end(self, run: Run, coordinator: str = "", **values: Any) -> None:
        """Closes a run, within a transaction: nothing is charged to it any more, its seeds and replies are deleted.

        Args:
            run: an open one.
            coordinator: who closes it, where it may be nobody's yet.
            values: what else its entry says.
        """
        self.append("close", run=run.name, **named(run.coordinator or coordinator), **values)
        charges = [(body["number"],) for body in run.charges]
        for table in ("seeds", "replies"):
            self.db.executemany(f"DELETE FROM {table} WHERE charge = ?", charges)  # noqa: S608


def anchor_dir_of(state_dir: Path, given: str) -> Path:
    """The anchor's folder: the one that a silo's settings give, or the default one where they give none."""
    return Path(given) if given else default_anchor_dir(state_dir)


def default_anchor_dir(state_dir: Path) -> Path:
    """The anchor's folder, beside the state directory: a backup of the latter that is put back leaves it alone."""
    place = state_dir.absolute()
    return place.with_name(f"{place.name}.anchor")
