"""What both sides of a secure sum compute alike: its agreement, and updates as vectors.

The agreement's context is all that a request for training says, the coordinator and the run: two silos that were asked
for anything else, be it a learning rate, have another digest, and nothing of theirs is unmasked together.
"""

from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from math import prod, sqrt

import numpy as np
import numpy.typing as npt

from configs.schema.federated import FederatedSettings
from federated.adapters.arrays import Arrays, flat, shaped
from federated.protocol import silo_pb2 as pb
from privacy.plan import PlanTerms
from privacy.secagg.agreement import Agreement, least_survivors
from privacy.secagg.encoding import Encoding, Words
from privacy.secagg.messages import pack
from privacy.secure_sum import SecureSum

# Most by which Adam moves a weight, in learning rates: by Cauchy and Schwarz the ratio of its moments is at most
# (1 - b1) / sqrt(1 - b2) / sqrt(1 - b1^2 / b2), which is 7.27, for betas of 0.9 and 0.999.
_ADAM = 7.3
_ADAM_BC = _ADAM * sqrt(11)  # its second moment is lowered to 1/11 of itself at most: by v of 1.1 v
_SGD_GRADIENT, _SGD_NOISE = 10, 10  # expected batches in a batch; standard deviations of the noise


def agreement(
    request: pb.Train | pb.Contribute | pb.Evaluate, terms: SecureSum, coordinator: str, run_id: str, length: int
) -> Agreement:
    """What a request for training, or for a private evaluation, makes all silos that are in its sum agree on.

    Args:
        request: the same for all of them, whole.
        terms: of the plan that they have reserved.
        coordinator: public key of whoever asks.
        run_id: the run.
        length: values in an update, or sums of an evaluation.

    Raises:
        InputError: it would not be secure, or is nothing that can be computed.
    """
    secure = secure_of(request)
    roster = {member.silo: member.public_key for member in secure.roster}
    asked, evaluates = request.SerializeToString(deterministic=True), isinstance(request, pb.Evaluate)
    kind = b"evaluation" if evaluates else b"round"
    said = b"siloweave secure %s 1\n" % kind + pack(coordinator.encode(), run_id.encode(), asked)
    context = sha256(said).digest()
    fewest = max(terms.fewest, least_survivors(len(roster), terms.colluders))
    if terms.noise is None or evaluates:  # each silo adds all noise to an evaluation itself
        encoding = Encoding(secure.clip, len(roster))
    else:  # how values become words is the noise's, and its numbers are the plan's, whose digest is in the request
        encoding = Encoding(terms.noise.reach, terms.most, terms.noise.word_bits)
    return Agreement(roster, terms.colluders, fewest, encoding, length, context)


def secure_of(request: pb.Train | pb.Contribute | pb.Evaluate) -> pb.Secure:
    """What a request says of who adds up."""
    return request.train.secure if isinstance(request, pb.Contribute) else request.secure


def members(roster: Mapping[str, str]) -> list[pb.Member]:
    """A roster, as requests say it."""
    return [pb.Member(silo=name, public_key=key) for name, key in sorted(roster.items())]


def update_bound(settings: FederatedSettings, plan: PlanTerms, pulled: float) -> float:
    """What no value of an honest silo's update exceeds: there it is cut, which changes a false update alone.

    Adam's bound holds for any gradients. For plain steps it holds where a batch has at most 10 times its expected size,
    of one unit at least, and noise at most 10 of its standard deviations, which one value in 10^22 exceeds.

    Args:
        settings: of the round.
        plan: what was reserved.
        pulled: largest absolute value of what is added to each gradient.
    """
    path = settings.learning_rate * settings.local_steps
    if settings.optimizer == "adam":
        return path * _ADAM
    if settings.optimizer == "adam_bc":
        return path * _ADAM_BC
    return path * (plan.max_grad_norm * (_SGD_GRADIENT + _SGD_NOISE * plan.noise_multiplier) + pulled)


def vector(update: Arrays, bound: float) -> npt.NDArray[np.float64]:
    """An update's values, cut to the bound, in the order of the names.

    Raises:
        ValueError: one is not finite.
    """
    values = flat(update).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("an update has a value that is not finite")
    return values.clip(-bound, bound)


def sums_bound(counts: Iterable[int], sums_std: float) -> float:
    """What no value of an honest silo's noised sums exceeds: there it is cut, which costs quality alone.

    Args:
        counts: the silos' public counts of units; a held-out unit adds 1 to a sum at most, and there are fewer of them.
        sums_std: standard deviation of the noise on a sum.
    """
    return max(counts) + _SGD_NOISE * sums_std


def written(sums: Sequence[float], encoding: Encoding) -> Words:
    """Noised sums as words, cut to what these can say."""
    return encoding.encode(np.asarray(sums, np.float64).clip(-encoding.clip, encoding.clip))


def length_of(like: Arrays) -> int:
    """Values in an update."""
    return sum(prod(array.shape) for array in like.values())


def arrays_of(values: npt.NDArray[np.float64], like: Arrays) -> Arrays:
    """A vector's values as the arrays that they were of."""
    return shaped(values.astype(np.float32), {name: array.shape for name, array in like.items()})
