"""The pull of all steps of a federation to where it started: L2 to the start's weights (Li et al. 2018, "L2-SP").

The penalty's gradient at weights w is strength * (w - start). A silo draws its steps back to the adapter that a round
brought, as FedProx does; the rest, strength * (brought - start), is the same in all steps of a round, and is sent as
what they add to each gradient. So a silo needs to know neither the start nor this rule, and bounds both as ever.
"""

from configs.schema.base import LARGEST_ADAPTER_VALUE
from federated.adapters.arrays import Arrays

_START = "start"


class Anchor:
    """The start, which is kept in the aggregation's state, and what follows from it for a round.

    Args:
        strength: of the pull.
        weights: what travels in this round.
        state: of the aggregation; empty before the first round, whose weights are the start.
    """

    def __init__(self, strength: float, weights: Arrays, state: Arrays) -> None:
        self._strength, self._weights = strength, weights
        self._start = {name: state.get(f"{_START}/{name}", array) for name, array in weights.items()}

    def correction(self) -> Arrays:
        """What each step of the round adds to its gradient, within what silos accept."""
        most = LARGEST_ADAPTER_VALUE
        pulls = {name: self._strength * (array - self._start[name]) for name, array in self._weights.items()}
        return {name: pull.clip(-most, most).astype(self._start[name].dtype) for name, pull in pulls.items()}

    @property
    def state(self) -> Arrays:
        """What the next round's aggregation has to know."""
        return {f"{_START}/{name}": array for name, array in self._start.items()}
