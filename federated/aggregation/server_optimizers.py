"""What the mean update of a round does to the shared weights (Reddi et al. 2021, "Adaptive Federated Optimization").

Written here because Flower's strategies neither save their moments nor start at a later round. Flower's also depart
from the paper: its FedAdam corrects the moments' bias, by the power of one round too many, and its second moments start
at 0 instead of tau^2. A test undoes both and compares.
"""

import numpy as np
import numpy.typing as npt

from configs.schema.federated import ADAPTIVE, FederatedSettings
from federated.adapters.arrays import Arrays

Moments = dict[str, npt.NDArray[np.float64]]

_ADAPTIVE_RATE = 0.01
_MOMENTUM, _SECOND = "momentum", "second"


def server_step(settings: FederatedSettings, weights: Arrays, mean: Arrays, state: Arrays) -> tuple[Arrays, Arrays]:
    """The weights and the optimizer's moments after a round.

    Moments are float32 in memory as in a commit, so that a run which is continued computes from the same values.

    Args:
        settings: the aggregation, its learning rate and the decay of its moments.
        weights: the shared weights.
        mean: the round's mean update, in the same shapes.
        state: the moments after the round before; empty before the first.
    """
    rate = settings.server_learning_rate or (_ADAPTIVE_RATE if settings.aggregation in ADAPTIVE else 1.0)
    after: Arrays = {}
    kept: Arrays = {}
    for name, update in mean.items():
        before = {
            key: state[f"{key}/{name}"].astype(np.float64) for key in (_MOMENTUM, _SECOND) if f"{key}/{name}" in state
        }
        direction, moments = _direction(settings, update.astype(np.float64), before)
        after[name] = (weights[name] + rate * direction).astype(np.float32)
        kept |= {f"{key}/{name}": moment.astype(np.float32) for key, moment in moments.items()}
    return after, kept


def _direction(
    settings: FederatedSettings, update: npt.NDArray[np.float64], before: Moments
) -> tuple[npt.NDArray[np.float64], Moments]:
    """Where the weights go, and the new moments; the update stands where SGD and Adam have a negative gradient."""
    method = settings.aggregation
    if method == "fedavgm":
        momentum = settings.server_momentum * before.get(_MOMENTUM, 0.0) + update
        return momentum, {_MOMENTUM: momentum}
    if method not in ADAPTIVE:
        return update, {}
    square, second = update**2, before.get(_SECOND, np.full_like(update, settings.server_tau**2))
    if method == "fedadagrad":
        second = second + square
        return update / (np.sqrt(second) + settings.server_tau), {_SECOND: second}
    rest = 1 - settings.server_second_moment_decay
    if method == "fedyogi":
        second = second - rest * square * np.sign(second - square)
    else:
        second = second + rest * (square - second)
    momentum = before.get(_MOMENTUM, 0.0) + (1 - settings.server_momentum) * (update - before.get(_MOMENTUM, 0.0))
    return momentum / (np.sqrt(second) + settings.server_tau), {_MOMENTUM: momentum, _SECOND: second}
