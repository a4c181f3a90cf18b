"""What a whole federation may claim, from what its silos claim."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from configs.errors import InputError

_MAXIMUM = "maximum over silos: every steward attests that its units are in no other silo"
_GROUP = (
    "all silos' data of one unit as a group: not every steward attests that its units are in no other, and one sum has "
    "the noise of all silos once"
)
_SUM = "sum over silos: not every steward attests that its units are in no other"


@dataclass(frozen=True)
class Claim:
    """(epsilon, delta) for one unit, whichever silos hold data of it.

    Attributes:
        epsilon: epsilon of the claim.
        delta: delta of the claim.
        rule: sum or maximum over silos, and why.
    """

    epsilon: float
    delta: float
    rule: str


def headline(epsilons: Mapping[str, float], deltas: Mapping[str, float], attested: Mapping[str, bool]) -> Claim:
    """The claim of a federation: the sum over its silos, by basic composition, for a unit may be in all of them.

    Only if every steward has attested that their units are in no other silo, it is the maximum: then a unit's data
    meets one silo's mechanism alone (parallel composition, McSherry 2009).

    Args:
        epsilons: epsilon of each silo that has reserved anything, by name.
        deltas: delta of each of the same silos.
        attested: whether the steward attests it; a silo that is not named has not.

    Raises:
        InputError: there is no silo, or not every silo has an epsilon and a delta that are numbers of a guarantee.
    """
    if not epsilons or set(epsilons) != set(deltas):
        raise InputError(
            f"epsilons are of silos {sorted(epsilons)} and deltas of {sorted(deltas)}: give both for every silo, and "
            "one silo at least"
        )
    for silo in epsilons:
        # Written so that what is not a number fails, too.
        if not (0 <= epsilons[silo] < float("inf") and 0 <= deltas[silo] < 1):
            raise InputError(
                f"silo {silo}: epsilon {epsilons[silo]} and delta {deltas[silo]} are no guarantee; give finite ones"
            )
    if all(attested.get(silo) is True for silo in epsilons):
        return Claim(max(epsilons.values()), max(deltas.values()), _MAXIMUM)
    return Claim(sum(epsilons.values()), sum(deltas.values()), _SUM)


def headline_of_sums(
    names: Sequence[str], epsilon: float, delta: float, attested: Mapping[str, bool], honest: int
) -> Claim:
    """The claim where silos make the noise of each sum together.

    Args:
        names: the silos that have reserved.
        epsilon: for a unit that is in one silo.
        delta: for such a unit.
        attested: whether a silo's steward attests that; a silo that is not named has not.
        honest: silos of each sum on which the noise rests.
    """
    rests = f"; rests on {honest} honest silos of each sum, whose noise it is"
    if names and all(attested.get(silo) is True for silo in names):
        return Claim(epsilon, delta, _MAXIMUM + rests)
    return Claim(*everywhere(epsilon, delta, len(names), one_sum=True), _GROUP + rests)


def everywhere(epsilon: float, delta: float, silos: int, *, one_sum: bool) -> tuple[float, float]:
    """Epsilon and delta for a unit that is in all silos.

    Where each silo adds its own noise that is basic composition: each has a mechanism of its own. A sum with one noise
    is one mechanism, and what it promises for a group of so many units (Vadhan 2017, lemma 2.2) has a delta that grows
    with epsilon; a delta of 1 promises nothing.

    Args:
        epsilon: for a unit that is in one silo.
        delta: for such a unit.
        silos: how many there are.
        one_sum: whether their noise is one.
    """
    if not one_sum:
        return epsilon * silos, delta * silos
    grown, factor = 0.0, 1.0
    for _ in range(silos):
        grown, factor = min(1.0, grown + factor * delta), factor * math.exp(min(epsilon, 500.0))
        if grown == 1:
            break
    return epsilon * silos, grown
