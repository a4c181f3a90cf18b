"""The sum of clients' clipped updates, exact, and its release: noise on the sum, then a constant divisor.

One client moves the sum by C at most, whatever it sends: its update is clipped here, in float64, whether it was clipped
before or not; an update with a value that is not finite counts as zeros; and no client counts twice. Rounding never
makes a vector longer.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from configs.schema.schema import LARGEST_NUMBER_OF_CLIENTS
from privacy.mechanism.noise import noised_sums
from privacy.mechanism.streams import Streams
from privacy.plan import PrivacyPlan

_BITS = 36  # of C; the sum of 2^16 updates has 2^52 of these parts at most, which float64 holds exactly
_NORM_ERROR = 1 + 2.0**-30  # more than what float64 rounds off a norm

Vector = dict[str, npt.NDArray[np.float64]]


def clipped(update: Mapping[str, npt.NDArray[np.float32]], max_norm: float) -> Vector:
    """An update of norm at most ``max_norm`` over all its arrays together; zeros where a value is not finite."""
    wide = {name: array.astype(np.float64) for name, array in update.items()}
    norm = math.sqrt(sum(float(np.square(array).sum()) for array in wide.values()))
    if not math.isfinite(norm):
        return {name: np.zeros_like(array) for name, array in wide.items()}
    scale = min(1.0, max_norm / (norm * _NORM_ERROR)) if norm else 0.0
    return {name: array * scale for name, array in wide.items()}


class ClippedSum:
    """Folds the clients' updates of one round in any order; all that is kept of each client is its name.

    Args:
        template: the arrays that are trained.
        plan: of the aggregator, with clients as units.
    """

    def __init__(self, template: Mapping[str, npt.NDArray[np.float32]], plan: PrivacyPlan) -> None:
        self._plan = plan
        self._totals = {name: np.zeros(array.shape, dtype=np.int64) for name, array in template.items()}
        self._shapes = {name: array.shape for name, array in template.items()}
        self._part = 2.0 ** (math.ceil(math.log2(plan.terms.max_grad_norm)) - _BITS)
        self._clients: set[str] = set()

    @property
    def count(self) -> int:
        """Clients whose updates are in the sum."""
        return len(self._clients)

    def add(self, client: str, update: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Folds one client's update in.

        What its values are is no reason to refuse it: who is counted must not depend on anybody's data.

        Raises:
            ValueError: its names or shapes are not the adapter's; or it is the client's second one; or there are more
                clients than the plan has.
        """
        if {name: array.shape for name, array in update.items()} != self._shapes:
            raise ValueError("its names or shapes are not the adapter's")
        if client in self._clients:
            raise ValueError("it has sent an update of this round before")
        if self.count >= min(self._plan.terms.num_clients, LARGEST_NUMBER_OF_CLIENTS):
            raise ValueError(f"more than the plan's {self.count} clients in one round")
        for name, array in clipped(update, self._plan.terms.max_grad_norm).items():
            self._totals[name] += np.trunc(array / self._part).astype(np.int64)  # towards zero: never longer than C
        self._clients.add(client)

    def noised_mean(self, streams: Streams) -> dict[str, npt.NDArray[np.float32]]:
        """The sum with its noise, over the plan's number of clients, whoever answered. float32.

        Args:
            streams: of the round's charge.
        """
        std, num_clients = self._plan.noise_std, self._plan.terms.num_clients
        means = {}
        for name, total in self._totals.items():
            exact = total.reshape(-1).astype(np.float64) * self._part
            noised = noised_sums(exact, std, streams, name)
            means[name] = (noised / num_clients).astype(np.float32).reshape(total.shape)
        return means
