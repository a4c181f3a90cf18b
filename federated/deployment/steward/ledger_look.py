"""A silo's ledger as it is at one moment: read without the silo's key, without a trace, and in nobody's way."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.schema.silo import SiloConfig
from configs.storage.layout import SiloFiles
from privacy.ledger.anchor import Anchor
from privacy.ledger.chain import History, body_of, verify_entries
from privacy.ledger.file import ANCHORED, read_only, read_version
from privacy.ledger.journal import RECONCILE, anchor_dir_of


@dataclass(frozen=True)
class Looked:
    """What a ledger says; numbers, chain and signatures hold.

    Attributes:
        bodies: what its entries say, oldest first.
        public_key: that has signed them; empty before the first one.
        doubt: why it may be an old one that was put back, in words for the steward; None where its anchor agrees.
    """

    bodies: list[dict[str, Any]]
    public_key: str
    doubt: str | None


def look(settings: SiloConfig) -> Looked:
    """Reads a silo's ledger, also while its service writes to it.

    Raises:
        InputError: there is none, it was damaged or edited, or is of a newer version.
    """
    require_ledger(settings)
    silo, path = settings.silo, SiloFiles(Path(settings.silo.state_dir)).ledger
    key = next((str(body_of(entry).get("public_key", "")) for entry in read_only(path)), "")
    seen: list[History] = []

    def history() -> History:
        entries = read_only(path)
        seen.append(History(entries, verify_entries(entries, str(path), key or None)))
        return seen[-1]

    # The anchor is read first: that of a silo at work is then never newer than the entries.
    anchored = read_version(path) >= ANCHORED
    doubt = Anchor(anchor_dir(settings)).doubt(path, (silo.id, silo.dataset_id, key), history, expected=anchored)
    return Looked((seen or [history()])[0].bodies, key, doubt)


def require_ledger(settings: SiloConfig, *, mend: bool = False) -> None:
    """A command that only looks must make neither a ledger nor its key.

    Args:
        settings: the silo's.
        mend: a ledger that is lost, and known by its anchor or its key, may be missing.

    Raises:
        InputError: there is none.
    """
    files, anchor = SiloFiles(Path(settings.silo.state_dir)), Anchor(anchor_dir(settings)).path
    ledger, known = files.ledger, anchor.exists() or files.key.exists()
    if ledger.exists() or (mend and known):
        return
    if anchor.exists():
        raise InputError(f"{ledger}: missing, and {anchor} tells of it; put its backup back, or run {RECONCILE}")
    raise InputError(f"{ledger}: no ledger yet; `siloweave silo init` and `silo serve` make it")


def anchor_dir(settings: SiloConfig) -> Path:
    """The folder of the ledger's anchor."""
    return anchor_dir_of(Path(settings.silo.state_dir), settings.silo.anchor_dir)
