"""Who masks against whom: each silo with its nearest on both sides of a ring (Bell et al. 2020), or all with all.

Bell et al. let the chance be small that a sparse graph betrays a silo. Here it never does, if there are no more
colluders than assumed, since each silo looks before it signs: if of any ``reach`` silos that follow each other on the
ring more than ``colluders`` are left, then no colluders can cut the honest ones apart. What is left to chance is only
whether such a round succeeds.
"""

from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import comb

from configs.errors import InputError
from privacy.secagg.sharing import MOST_HOLDERS

LARGEST_FAILURE = Fraction(1, 2**30)  # chance that a sparse round fails although ``min_survivors`` stay


@dataclass(frozen=True)
class Ring:
    """The silos in their order.

    Attributes:
        order: names.
        reach: how many neighbours each has on either side; None: all with all.
        colluders: how many may collude with the server.
    """

    order: tuple[str, ...]
    reach: int | None
    colluders: int

    @property
    def threshold(self) -> int:
        """How many of a neighbourhood's shares give a secret: more than half, and more than the colluders have."""
        return _threshold(len(self.order) if self.reach is None else 2 * self.reach + 1, self.colluders)

    def neighbourhood(self, name: str) -> tuple[str, ...]:
        """A silo's neighbours and itself: the holders of its shares 1, 2, ..."""
        if self.reach is None:
            return self.order
        here = self.order.index(name)
        around = range(here - self.reach, here + self.reach + 1)
        return tuple(self.order[position % len(self.order)] for position in around)

    def cuts(self, left: Collection[str]) -> bool:
        """Whether so few are left somewhere on the ring that colluders could cut the honest ones apart."""
        if self.reach is None:
            return False
        there = [name in left for name in self.order]
        around = there + there[: self.reach]
        return min(sum(around[start : start + self.reach]) for start in range(len(there))) <= self.colluders


@lru_cache(maxsize=64)
def reach_needed(silos: int, colluders: int, min_survivors: int) -> int | None:
    """The smallest reach with which a round fails by bad luck at most once in 2^30; None: all with all.

    Raises:
        InputError: no ring will do, and all with all are more than a secret can have holders.
    """
    for reach in range(colluders + 1, min(silos, MOST_HOLDERS + 1) // 2):
        if 2 * reach + 1 < silos and failure_chance(silos, colluders, min_survivors, reach) <= LARGEST_FAILURE:
            return reach
    if silos > MOST_HOLDERS:
        raise InputError(
            f"{silos} silos with {colluders} colluders and min_survivors = {min_survivors}: above {MOST_HOLDERS} silos "
            "this needs fewer colluders, or more survivors"
        )
    return None


def failure_chance(silos: int, colluders: int, min_survivors: int, reach: int) -> Fraction:
    """Upper bound of the chance that a ring fails if chance alone picks ``silos - min_survivors`` that are missing.

    The union over all places of exact hypergeometric tails: a stretch of ``reach`` with at most ``colluders`` left,
    or a neighbourhood with fewer left than its threshold.
    """
    around = 2 * reach + 1
    thin = _at_most(colluders, reach, silos, min_survivors)
    few = _at_most(_threshold(around, colluders) - 1, around, silos, min_survivors)
    return min(Fraction(1), silos * (thin + few))


def _threshold(holders: int, colluders: int) -> int:
    return max(holders // 2, colluders) + 1


def _at_most(most: int, places: int, silos: int, left: int) -> Fraction:
    """Chance that of some places at most so many are among those left."""
    ways = sum(comb(places, there) * comb(silos - places, left - there) for there in range(min(most, left, places) + 1))
    return Fraction(ways, comb(silos, left))
