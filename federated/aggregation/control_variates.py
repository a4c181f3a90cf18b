"""SCAFFOLD (Karimireddy et al. 2020), option II, at the coordinator: nothing of it persists at a silo.

A silo's variate is the mean gradient of its steps in a round, which follows from the update that it released. So the
coordinator computes it, and sends the silo the difference between the mean variate of all and its own, which the silo
adds to each noised gradient. Both are made of released values alone: nothing here is charged.
"""

import numpy as np
import numpy.typing as npt

from configs.schema.base import LARGEST_ADAPTER_VALUE
from federated.adapters.arrays import Arrays

# Silos refuse a larger correction, c - c_i; and c, a mean of variates, is no longer than the longest of them.
_LARGEST_VARIATE = LARGEST_ADAPTER_VALUE / 2 - 1
_COMMON, _SILO, _NUM_SILOS = "common", "silo", "num_silos"


class ControlVariates:
    """The variates before a round, c and each silo's c_i, and what the round makes of them.

    Args:
        template: arrays of the updates' names and shapes.
        state: ``after`` of the round before; empty before the first, when all variates are 0.
        path: learning rate times number of a silo's steps in a round: an update over it is a mean gradient.
        num_silos: silos of the federation now, whoever answers. No request depends on it: a round that is asked again
            after a restart has the same requests, also when silos have joined.
    """

    def __init__(self, template: Arrays, state: Arrays, path: float, num_silos: int) -> None:
        self._template, self._state, self._path, self._num_silos = template, state, path, num_silos
        self._after = dict(state)

    def correction(self, silo: str) -> Arrays:
        """What a silo adds to its gradients: c - c_i."""
        return {name: self._get(_COMMON, name) - self._get(f"{_SILO}/{silo}", name) for name in self._template}

    def add(self, silo: str, update: Arrays) -> None:
        """A silo's next variate: c_i - c - update / path.

        Raises:
            ValueError: it is so large that the silos could not be sent the corrections that follow from it.
        """
        path = np.float32(self._path)
        found = {name: -correction - update[name] / path for name, correction in self.correction(silo).items()}
        if not all(np.abs(variate).max(initial=0) <= _LARGEST_VARIATE for variate in found.values()):
            raise ValueError(
                f"its mean gradient, which follows from its update, has a value above {_LARGEST_VARIATE:g}"
            )
        self._after |= {f"{_SILO}/{silo}/{name}": variate.astype(np.float32) for name, variate in found.items()}

    def after(self, mean: Arrays, count: int) -> Arrays:
        """All variates after the round; c is the mean c_i of all silos, those that never answered counting as 0.

        Args:
            mean: mean update of those that answered: the sum of their changes is -count * (c + mean / path).
            count: how many answered.
        """
        before = float(self._state[_NUM_SILOS][0]) if self._state else 0.0
        for name, update in mean.items():
            common = self._get(_COMMON, name).astype(np.float64)
            total = before * common - count * (common + update.astype(np.float64) / self._path)
            self._after[f"{_COMMON}/{name}"] = (total / self._num_silos).astype(np.float32)
        self._after[_NUM_SILOS] = np.array([self._num_silos], dtype=np.float32)
        return self._after

    def _get(self, whose: str, name: str) -> npt.NDArray[np.float32]:
        return self._state.get(f"{whose}/{name}", np.zeros_like(self._template[name]))
