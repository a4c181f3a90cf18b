"""Poisson sampling: every unit is in a step's batch independently. An empty batch is a step like any other."""

import numpy as np
import numpy.typing as npt

from privacy.plan import PrivacyPlan
from privacy.streams import Streams


def poisson_sample(plan: PrivacyPlan, streams: Streams, step: int, num_units: int) -> npt.NDArray[np.int64]:
    """Indices of the units in this step's batch, ascending.

    Args:
        plan: gives the sampling rate.
        streams: the charge's random streams.
        step: step within the charge.
        num_units: units that exist; used to draw for each of them, never as a size in the guarantee.
    """
    draws = streams.generator("sample", step).integers(2**64, size=num_units, dtype=np.uint64)
    return np.flatnonzero(draws < np.uint64(plan.inclusion_threshold)).astype(np.int64)
