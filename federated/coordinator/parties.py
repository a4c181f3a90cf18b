"""Which silos take part, and by which of Flower's nodes each is reached."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from privacy.ledger.ledger import Ledger
from privacy.signing import Signer

Roster = Callable[[], Mapping[str, str]]


@dataclass(frozen=True)
class Parties:
    """Who takes part in a federation.

    Attributes:
        signer: the coordinator's key.
        num_silos: silos to wait for at the start.
        roster: gives the enrolled silos' public keys by name, read anew each round; None takes whoever answers, which
            is for simulations.
        open_ledger: opens the coordinator's ledger, which a run with clients as units needs.
    """

    signer: Signer
    num_silos: int
    roster: Roster | None = None
    open_ledger: Callable[[], Ledger] | None = None

    @property
    def size(self) -> int:
        """Silos of the federation, whoever is there."""
        return len(self.roster()) if self.roster else self.num_silos
