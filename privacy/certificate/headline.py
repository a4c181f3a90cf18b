"""What a whole federation may claim, from what its silos claim."""

from collections.abc import Mapping
from dataclasses import dataclass

from configs.errors import InputError

_MAXIMUM = "maximum over silos: every steward attests that its units are in no other silo"
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
