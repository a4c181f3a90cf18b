"""Which replies a step needs, and which it has."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from configs.errors import InputError, PolicyRefusal
from configs.schema.base import named_as
from configs.schema.federated import FederatedSettings

_SHOWN = 10


def check_names(settings: FederatedSettings, silos: Iterable[str]) -> None:
    """Refuses rules about silos that don't exist.

    Raises:
        InputError: a name in ``required_silos`` or ``deadlines_s`` is none of these.
    """
    names = sorted(silos)
    for setting in ("required_silos", "deadlines_s"):
        given = getattr(settings, setting)
        unknown = sorted(set(given) - {named_as(name, given) for name in names})
        if unknown:
            shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            raise InputError(f"federated.{setting} has {unknown}: none of the {len(names)} silos ({shown})")


@dataclass
class Quorum:
    """Which replies a step needs, and those that it has.

    Attributes:
        fewest: silos that have to be left.
        already: silos that need not be asked and count as having answered.
        enough: replies after which the others are not waited for; 0: all.
        grace_s: for how long they are, all the same.
        rule: what says how many are fewest.
        missing: the silos that the step can't do without, beside those that it is given.
        answered: whose replies were accepted.
        refusals: silos, and what their policies have refused.
        unmet: what is wrong, once the step has ended without what it needs.
    """

    fewest: int
    already: int = 0
    enough: int = 0
    grace_s: float = 0.0
    rule: str = "federated.min_silos is"
    missing: Callable[[Iterable[str]], list[str]] = lambda _: []
    answered: list[str] = field(default_factory=list)
    refusals: list[tuple[str, PolicyRefusal]] = field(default_factory=list)
    unmet: str = ""
    _enough_at: float | None = None

    def over(self) -> bool:
        """Whether the other silos are waited for no longer."""
        if not 0 < self.enough <= len(self.answered) or self.missing(self.answered):
            return False
        if self._enough_at is None:
            self._enough_at = time.monotonic()
        return time.monotonic() - self._enough_at >= self.grace_s
