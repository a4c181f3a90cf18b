"""Which replies a step needs, and which it has."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from configs.errors import PolicyRefusal


@dataclass
class Quorum:
    """Which replies a step needs, and those that it has.

    Attributes:
        fewest: silos that have to be left.
        already: silos that need not be asked and count as having answered.
        enough: replies after which the others are not waited for; 0: all.
        grace_s: for how long they are, all the same.
        missing: the silos that the step can't do without, beside those that it is given.
        answered: whose replies were accepted.
        refusals: what policies have refused.
    """

    fewest: int
    already: int = 0
    enough: int = 0
    grace_s: float = 0.0
    missing: Callable[[Iterable[str]], list[str]] = lambda _: []
    answered: list[str] = field(default_factory=list)
    refusals: list[PolicyRefusal] = field(default_factory=list)
    _enough_at: float | None = None

    def over(self) -> bool:
        """Whether the other silos are waited for no longer."""
        if not 0 < self.enough <= len(self.answered) or self.missing(self.answered):
            return False
        if self._enough_at is None:
            self._enough_at = time.monotonic()
        return time.monotonic() - self._enough_at >= self.grace_s
