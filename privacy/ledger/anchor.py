"""The anchor: the ledger's signed head, kept outside the state directory, so that an old ledger put back is noticed.

It is a receipt that the silo keeps for itself. A receipt of a coordinator that speaks against the ledger is kept beside
it: the doubt survives restarts, and another old file put back, until the ledger is reconciled.
"""

import json
from collections.abc import Callable
from pathlib import Path

from configs.errors import InputError, SiloweaveError
from configs.parse import parse
from configs.storage.files import canonical_json, digest_bytes, private_folder, write_atomic
from privacy.ledger.chain import History
from privacy.ledger.runs import Runs
from privacy.ledger.statements import Receipt, Spend

ANCHOR_FILE = "ledger.anchor"


class Anchor:
    """The anchor file of one ledger."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ANCHOR_FILE

    def read(self) -> list[Receipt] | None:
        """The newest head, and the receipts that speak against the ledger; None where there is no anchor.

        Raises:
            InputError: the file is damaged or edited.
            SiloweaveError: it is there and can't be read.
        """
        try:
            value = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SiloweaveError(f"{self.path}: can't be read ({error.strerror}); mend that, then ask again") from None
        except (ValueError, RecursionError):
            raise InputError(f"{self.path}: not JSON: the anchor was damaged") from None
        if not isinstance(value, list) or not value:
            raise InputError(f"{self.path}: no list of receipts: the anchor was damaged")
        receipts = [parse(Receipt, item, str(self.path)) for item in value]
        if not all(receipt.holds() for receipt in receipts):
            raise InputError(f"{self.path}: a signature doesn't hold: the anchor was edited or damaged")
        return receipts

    def doubt(
        self, path: Path, owner: tuple[str, str, str], history: Callable[[], History], *, expected: bool
    ) -> str | None:
        """Why a ledger may be an old one, in words for its steward; None where the anchor agrees with it.

        Args:
            path: the ledger, for the message.
            owner: its silo, dataset and public key.
            history: reads the entries; called after the anchor is read, so that the anchor of a silo at work is never
                newer than what it gives.
            expected: whether there has to be an anchor.
        """
        try:
            receipts = self.read()
        except InputError as error:
            return str(error)
        if receipts is None:
            return f"{self.path}: the anchor is missing" if expected else None
        first = receipts[0]
        if any((receipt.silo, receipt.dataset) != owner[:2] for receipt in receipts):
            return f"{self.path}: is the anchor of silo {first.silo!r} and dataset {first.dataset!r}"
        if first.public_key != owner[2]:
            return f"{self.path}: the anchor was signed with another key than {path} is"
        present = history()
        reasons = (against(receipt, present) for receipt in receipts)
        return next((f"{path}: {reason}" for reason in reasons if reason), None)

    def write(self, receipts: list[Receipt]) -> None:
        """Replaces the anchor, synced before this returns.

        Raises:
            InputError: the anchor's folder is another user's.
            SiloweaveError: the disk is full or not writable.
        """
        private_folder(self.path.parent)
        write_atomic(self.path, canonical_json([receipt.model_dump(mode="json") for receipt in receipts]), mode=0o600)


def against(receipt: Receipt, history: History) -> str | None:
    """Why a genuine receipt of this ledger speaks against its entries; None where it doesn't.

    A head in the chain is no evidence. Nor is one from before the last reconciliation of which nothing is missing:
    every run that was open then was closed by it, so that nothing that it lost can be asked for again.
    """
    if _in_chain(receipt, history) or (receipt.epoch < history.epoch and not missing(receipt, history)):
        return None
    return f"entry {receipt.number} was signed and is not in the ledger: an old or other ledger was put back"


def missing(receipt: Receipt, history: History) -> list[Spend]:
    """The spends that a receipt proves and that the entries don't charge.

    A head that is not in the chain is one of another branch. A run that was reserved before the two parted and charged
    since may have released one round in both: its reservation counts once more, under a name of its own.
    """
    if _in_chain(receipt, history):
        return []
    known = {spend.entry for spend in history.spends}
    return [spend for spend in (*receipt.spends, *_in_both(receipt, history)) if spend.entry not in known]


def _in_both(receipt: Receipt, history: History) -> list[Spend]:
    shared = {spend.entry for spend in receipt.spends}
    hashes = {entry["number"]: entry["hash"] for entry in history.entries}
    runs = [run for run in Runs(history.bodies) if hashes[run.opening["number"]] in shared]
    parted = max((run.opening["number"] for run in runs), default=0)  # or later: nobody can tell
    return [
        Spend(
            entry=digest_bytes(f"{hashes[run.opening['number']]}\n{receipt.head}".encode()),
            epsilon=run.opening["epsilon"],
            delta=run.opening["delta"],
        )
        for run in runs
        if any(charge["number"] > parted for charge in run.charges)
    ]


def _in_chain(receipt: Receipt, history: History) -> bool:
    entries = history.entries
    return receipt.number <= len(entries) and entries[receipt.number - 1]["hash"] == receipt.head
