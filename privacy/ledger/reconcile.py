"""Takes what receipts prove was spent into a ledger that was put back, so that it may be used again.

What is lost is known from two sides: the anchor, which is the silo's own last receipt, and the receipts that
coordinators hold. Every spend in them that the file doesn't know is charged, once. Every reservation whose run may have
released rounds both in the file and in the branch that is lost is charged once more. Lost charges can't be told from
charges that never were: so every run that is open is closed, and nothing can be asked for again under its reservation.
No receipt tells of runs with clients as units: a mandate that they may have used covers no more of them afterwards.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.parse import parse
from configs.storage.files import digest_bytes
from configs.storage.layout import SiloFiles
from privacy.ledger.anchor import Anchor, against, missing
from privacy.ledger.chain import Budget, left, policy_budget, verify_entries
from privacy.ledger.file import ANCHORED, read_only, read_version
from privacy.ledger.journal import Journal, default_anchor_dir
from privacy.ledger.runs import Runs
from privacy.ledger.statements import Receipt, Spend


@dataclass(frozen=True)
class Reconciled:
    """What a reconciliation did.

    Attributes:
        doubt: why it was needed; None where there was nothing to do.
        receipts: how many it took in.
        spends: what it charged.
        charged_again: how many of them are reservations that the ledger had charged: their runs may have released
            rounds here and in a branch that is lost.
        closed_runs: runs that were open.
        left: what no run has reserved yet.
    """

    doubt: str | None
    receipts: int
    spends: tuple[Spend, ...]
    charged_again: int
    closed_runs: tuple[str, ...]
    left: Budget


def reconcile(journal: Journal, budget: Budget, receipts: list[Receipt]) -> Reconciled:
    """Charges what is missing, closes what is open, and anchors the ledger anew.

    Killed before its end it has done nothing, or everything but the anchor: then the next start, or the next
    reconciliation, moves that on and finds nothing more to charge.

    Args:
        journal: the silo's ledger file and anchor, opened.
        budget: the policy in force, for a ledger that was lost altogether.
        receipts: of this silo and dataset, from coordinators.

    Raises:
        InputError: the file itself is damaged, or a receipt or the anchor is not this silo's.
    """
    with journal.locked():
        verify_entries(journal.entries(), str(journal.path), journal.signer.public_key)
        journal.check_owner()
        anchored, _ = journal.anchored()
        keys = {journal.signer.public_key, *(receipt.public_key for receipt in anchored)}
        for receipt in receipts:
            _check_own(journal, receipt, keys)
        doubt = journal.doubt() or _first_against(journal, receipts)
        journal.bind(budget)
        result = _take_in(journal, doubt, [*anchored, *receipts])
    with journal.locked():
        journal.write_anchor()
    journal.scrub()
    return result


def _take_in(journal: Journal, doubt: str | None, receipts: list[Receipt]) -> Reconciled:
    history = journal.history()
    if doubt is None:
        return Reconciled(None, 0, (), 0, (), left(history.bodies))
    lost = {spend.entry: spend for receipt in receipts for spend in missing(receipt, history)}
    proven = {spend.entry for receipt in receipts for spend in receipt.spends}
    runs = Runs(history.bodies).open()
    for run in runs:
        journal.end(run)
    journal.append(
        "reconcile",
        epoch=1 + max([history.epoch, *(receipt.epoch for receipt in receipts)]),
        anchor=journal.anchored()[1],
        receipts=[{"number": receipt.number, "head": receipt.head} for receipt in receipts],
        spends=[spend.model_dump() for spend in lost.values()],
        epsilon=sum(spend.epsilon for spend in lost.values()),
        delta=sum(spend.delta for spend in lost.values()),
        mandates=_mandates(SiloFiles(journal.path.parent)),
    )
    closed = tuple(run.name for run in runs)
    return Reconciled(
        doubt, len(receipts), tuple(lost.values()), len(lost.keys() - proven), closed, left(journal.bodies())
    )


def _mandates(files: SiloFiles) -> list[str]:
    """Digests of the mandates that are there: what runs without noise claimed under them may be lost for good."""
    return sorted(digest_bytes(path.read_bytes()) for path in files.mandates.glob("*.json") if path.is_file())


def _check_own(journal: Journal, receipt: Receipt, keys: set[str]) -> None:
    """A key that was lost with its ledger still vouches for what it signed, as the anchor shows which one it was."""
    if not journal.is_own(receipt) or receipt.public_key not in keys or not receipt.holds():
        raise InputError(
            f"receipt for entry {receipt.number} of silo {receipt.silo!r}: not signed by the key of silo "
            f"{journal.silo_id!r}; give the receipts as the coordinator wrote them"
        )


def _first_against(journal: Journal, receipts: list[Receipt]) -> str | None:
    history = journal.history()
    reasons = (against(receipt, history) for receipt in receipts)
    return next((f"{journal.path}: {reason}" for reason in reasons if reason), None)


def read_receipts(path: Path, silo_id: str, dataset_id: str) -> list[Receipt]:
    """The receipts of one silo and dataset in a coordinator's file: ``silos.json``, ``certificate.json``, or a receipt.

    Raises:
        InputError: it can't be read, or holds no receipt of this silo.
    """
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}); give a file of receipts") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not JSON; give the coordinator's silos.json or certificate.json") from None
    found = [parse(Receipt, item, str(path)) for item in _receipts_in(tree)]
    own = [receipt for receipt in found if (receipt.silo, receipt.dataset) == (silo_id, dataset_id)]
    if not own:
        raise InputError(
            f"{path}: no receipt of silo {silo_id!r} and dataset {dataset_id!r}; give the coordinator's silos.json or "
            "certificate.json"
        )
    return own


def _receipts_in(tree: Any) -> list[dict[str, Any]]:
    if isinstance(tree, dict):
        if tree.get("kind") == "receipt":
            return [tree]
        tree = list(tree.values())
    return [receipt for item in tree for receipt in _receipts_in(item)] if isinstance(tree, list) else []


def identity(state_dir: Path) -> tuple[str, str, Budget]:
    """Silo, dataset and policy of a ledger with its anchor beside it: by its entries, or the anchor where it is lost.

    Raises:
        InputError: there is neither, or the anchor is not where one is found without the silo.toml.
    """
    path, anchor = SiloFiles(state_dir).ledger, Anchor(default_anchor_dir(state_dir))
    entries = read_only(path) if path.exists() else []
    anchored = anchor.read()
    if not entries:
        if anchored is None:
            raise InputError(f"{path}: no ledger, and no anchor in {anchor.path.parent}; give the silo.toml instead")
        return _identity_of(anchored[0])
    if anchored is None and read_version(path) >= ANCHORED:
        raise InputError(
            f"{anchor.path}: no such anchor; where silo.anchor_dir is set it lies elsewhere and may agree with the "
            "ledger, so give the silo.toml instead of the folder"
        )
    bodies = verify_entries(entries, str(path))
    return bodies[0]["silo"], bodies[0]["dataset"], policy_budget(bodies)


def _identity_of(receipt: Receipt) -> tuple[str, str, Budget]:
    """What was left and what was spent make the budget, but for the last digits."""
    totals = (
        receipt.epsilon_left + sum(spend.epsilon for spend in receipt.spends),
        receipt.delta_left + sum(spend.delta for spend in receipt.spends),
    )
    return receipt.silo, receipt.dataset, Budget(*(float(f"{total:.12g}") for total in totals))
