"""The sum of clients' clipped updates under masks, and its release by an aggregator that sees no single one of them.

A client writes its clipped update as whole steps, each value cut towards zero, so that it gets no longer than C. Words
are these numbers modulo 2^32, and so is their sum. Nobody can shorten what another client has sent: one that lies may
move the sum anywhere, and over the edge where words wrap. So the noise is added to the words themselves, before a value
is read out of them: as whole numbers modulo 2^32 an honest client moves the sum by C at most, wherever others have put
it, and all that is read out afterwards is post-processing of the Gaussian mechanism's release.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from privacy.mechanism.client_sum import clipped
from privacy.mechanism.noise import grid, standard_normal
from privacy.mechanism.streams import Streams
from privacy.plan import PrivacyPlan
from privacy.secagg.encoding import Encoding, Words

_NOISE = 10  # deviations of noise for which words have room beside honest updates; one value in 10^22 exceeds them
_LARGEST = 2**31 - 2  # steps of a sum; one is left for what rounding the noise adds


def client_encoding(plan: PrivacyPlan, silos: int) -> Encoding:
    """How an update becomes words: the clip is the longest that a word may say, a power of two for each of its steps.

    Args:
        plan: with clients as units.
        silos: of the roster.
    """
    needed = (silos * plan.terms.max_grad_norm + _NOISE * plan.noise_std) / _LARGEST
    step = max(grid(plan.noise_std), 2.0 ** math.ceil(math.log2(needed)))
    return Encoding(step * Encoding(1.0, silos).largest, silos)


def client_words(update: Mapping[str, npt.NDArray[np.float32]], max_norm: float, encoding: Encoding) -> Words:
    """A client's update, at most ``max_norm`` long, as words in the order of the names; zeros if one isn't finite."""
    short = clipped(update, max_norm)
    values = np.concatenate([short[name].reshape(-1) for name in sorted(short)])
    return np.trunc(values / _step(encoding)).astype(np.int64).astype(encoding.dtype)


def noised_client_mean(
    total: Words, plan: PrivacyPlan, encoding: Encoding, streams: Streams
) -> npt.NDArray[np.float64]:
    """The mean over the plan's number of clients of a sum of words, with noise, whoever is in it.

    Args:
        total: the sum under masks.
        plan: of the aggregator, with clients as units.
        encoding: of the words.
        streams: of the round's charge.
    """
    step = _step(encoding)
    noise = standard_normal(streams.generator("metric", 0, "masked clients"), len(total)) * (plan.noise_std / step)
    steps = (total.astype(np.int64) + np.rint(noise).astype(np.int64)).astype(encoding.dtype)
    return steps.view(np.int32).astype(np.float64) * step / plan.terms.num_clients


def _step(encoding: Encoding) -> float:
    """What one of a word's steps stands for, exactly: the clip is so many of them."""
    return encoding.clip / encoding.largest
