"""How many passes a step's batch takes, where nothing is known of the records but how many a step is expected to draw.

A batch is cut by shape, and each shape's share into parts of proven sizes (``privacy.clipping.independence``). On a
small model a step's seconds are those of its passes, however few records each has; so the number of parts is what a
prediction needs. Lengths are a silo's secret: here every shape is as likely as any other.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

_BEYOND = 10  # deviations above the mean at which a Poisson draw no longer counts


def parts(records: int, sizes: Sequence[int]) -> Counter[int]:
    """How many parts of each size so many records of one shape are cut into, the largest that fits first.

    Args:
        records: there are.
        sizes: that are proven, 1 among them.
    """
    found = Counter[int]()
    for size in sorted(sizes, reverse=True):
        found[size], records = divmod(records, size)
    return found


def expected_parts(records: float, sizes: Sequence[int]) -> dict[int, float]:
    """How many parts of each size a step has on average, of one shape whose number of records is Poisson-distributed.

    Args:
        records: their mean.
        sizes: as in ``parts``.
    """
    farthest = _BEYOND * (math.sqrt(records) + 1)
    found = dict.fromkeys(sizes, 0.0)
    for number in range(max(0, math.floor(records - farthest)), math.ceil(records + farthest)):
        share = math.exp(number * math.log(records) - records - math.lgamma(number + 1))
        for size, there in parts(number, sizes).items():
            found[size] += share * there
    return found


def batch_seconds(
    records: float, tokens: Sequence[int], passes: Mapping[int, Mapping[int, float]], steps: int
) -> tuple[float, float]:
    """Seconds of the passes of a step's batch, and those that proofs take once.

    A size is proven for a shape when it first occurs: twice, by one pass of its records together and one of each alone.

    Args:
        records: that a step is expected to draw, of all shapes together.
        tokens: of an example of each shape.
        passes: seconds of a pass by its records' tokens and by its size, the same sizes for each; in between they are
            interpolated.
        steps: of the whole run.
    """
    measured, step_s, proofs_s = sorted(passes), 0.0, 0.0
    sizes = sorted(passes[measured[0]])
    each = expected_parts(records / len(tokens), sizes)
    alone = np.interp(tokens, measured, [passes[length][1] for length in measured])
    for size in sizes:
        together = np.interp(tokens, measured, [passes[length][size] for length in measured])
        step_s += each[size] * float(together.sum())
        if size > 1:
            proofs_s += 2 * min(1.0, steps * each[size]) * float((together + size * alone).sum())
    return step_s, proofs_s
