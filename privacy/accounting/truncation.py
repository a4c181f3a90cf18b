"""Truncated Poisson sampling: a fixed cap on batches, sound whatever the number of units is.

How much a cap costs depends on the number of units, which is private under add-or-remove-one: the more there are, the
likelier a unit pushes another one out. Keeping the first ``max_units`` would not help, since adding a unit would then
remove another from the dataset, which is a different relation. So a silo tests its size, in every round, with noise
(propose-test-release; Dwork and Lei 2009): a dataset of ``max_units`` or more passes with tiny probability, and one
that fails trains on empty batches. The test's noise is composed with the steps, its failures are a share of delta.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

FAILURE_SHARE = 0.01
_NOISE = 20.0  # all tests of a run together cost what one Gaussian release at this noise multiplier does
_SURE = 4.0  # deviations of the test's noise at which a dataset of the declared size passes


@dataclass(frozen=True)
class Truncation:
    """A cap on batches.

    Attributes:
        max_units: most units of a dataset; a larger one trains on nothing.
        max_batch_size: most units of a batch; of more, a random subset is kept.
    """

    max_units: int
    max_batch_size: int

    def displacement_probability(self, q: float) -> float:
        """Probability that a full batch of other units is drawn, in a dataset of ``max_units``."""
        from scipy import stats

        drawn = float(stats.binom.sf(self.max_batch_size - 1, self.max_units - 1, q))
        return min(1.0, drawn * (1 + 1e-9))  # what floating point may have lost


def size_noise(rounds: int) -> float:
    """Standard deviation of the noise on a dataset's size in the test of one round."""
    return _NOISE * math.sqrt(rounds)


def size_margin(rounds: int, delta: float) -> int:
    """How far below ``max_units`` a noised size must be: more units pass in a round only with a share of delta."""
    return math.ceil(-size_noise(rounds) * NormalDist().inv_cdf(FAILURE_SHARE * delta / rounds))


def units_for(public_record_count: int, rounds: int, delta: float) -> int:
    """The ``max_units`` with which datasets of the declared size pass the test in 99.99% of the rounds."""
    return public_record_count + size_margin(rounds, delta) + math.ceil(_SURE * size_noise(rounds))
