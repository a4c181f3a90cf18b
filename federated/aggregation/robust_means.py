"""Means that a few silos which send anything can't move far: median, trimmed mean (Yin et al. 2018), Krum.

They need all updates of a round at once, so memory grows with the silos. They see what silos release, which carries its
own noise: nothing here touches the guarantee.
"""

import numpy as np
import numpy.typing as npt

from configs.schema.federated import FederatedSettings
from federated.adapters.arrays import Arrays, check_update, flat, to_bytes


class HeldUpdates:
    """The updates of one round, up to ``max_silos``, and their robust mean. The order of replies doesn't matter.

    Args:
        template: arrays of the updates' names and shapes.
        settings: the rule, and how many silos may lie.
    """

    def __init__(self, template: Arrays, settings: FederatedSettings) -> None:
        self._template, self._settings = template, settings
        self._updates: list[Arrays] = []

    def add(self, update: Arrays) -> None:
        """Takes one update in.

        Raises:
            ValueError: see ``check_update``; or there are too many updates.
        """
        check_update(update, self._template)
        if len(self._updates) >= self._settings.max_silos:
            raise ValueError(f"more than federated.max_silos ({self._settings.max_silos}) updates in one round")
        self._updates.append(update)

    @property
    def count(self) -> int:
        """Updates so far."""
        return len(self._updates)

    def mean(self) -> Arrays:
        """The rule's result.

        Raises:
            ValueError: too few updates for the rule.
        """
        if self._settings.aggregation == "krum":
            return krum(self._updates, self._settings.byzantine_silos)
        rule = np.median if self._settings.aggregation == "median" else self._trimmed_mean
        return {
            name: np.asarray(
                rule(np.stack([update[name] for update in self._updates]).astype(np.float64), axis=0)
            ).astype(np.float32)
            for name in self._template
        }

    def _trimmed_mean(self, values: npt.NDArray[np.float64], axis: int) -> npt.NDArray[np.float64]:
        cut = self._settings.byzantine_silos
        if len(values) <= 2 * cut:
            raise ValueError(f"{len(values)} updates: a mean without the {cut} at each end needs {2 * cut + 1}")
        kept: npt.NDArray[np.float64] = np.sort(values, axis)[cut : len(values) - cut].mean(axis)
        return kept


def krum(updates: list[Arrays], byzantine: int) -> Arrays:
    """The update with the smallest sum of squared distances to its n - f - 2 nearest (Blanchard et al. 2017).

    Equal scores, for instance of equal updates, are decided by the updates' bytes.

    Raises:
        ValueError: fewer than 2 f + 3 updates.
    """
    nearest = len(updates) - byzantine - 2
    if len(updates) < 2 * byzantine + 3:
        raise ValueError(f"{len(updates)} updates: Krum with {byzantine} silos that may lie needs {2 * byzantine + 3}")
    ordered = sorted(updates, key=to_bytes)
    rows = np.stack([flat(one) for one in ordered]).astype(np.float64)
    # Row by row instead of by inner products: no cancellation, and a distance is the same from both ends.
    distances = np.array([((rows - one) ** 2).sum(axis=1) for one in rows])
    np.fill_diagonal(distances, np.inf)
    scores = np.sort(distances, axis=1)[:, :nearest].sum(axis=1)
    return ordered[int(np.argmin(scores))]
