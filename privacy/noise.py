"""Gaussian noise on a sum of clipped gradients, in float64, rounded to a public grid.

Naive floating-point Gaussian samples leave traces of the value under them (Mironov 2012). Two counter-measures: the
noise is a sum of four draws (Holohan and Braghin 2021, as in Opacus' secure mode), and the noised sum is rounded to
multiples of a power of two that depends on the plan alone.
"""

import math

import numpy as np
import torch

from privacy.plan import PrivacyPlan
from privacy.streams import Streams

_GRID_BITS = 20


def grid(noise_std: float) -> float:
    """Spacing of the public grid: a power of two, 2^-20 to 2^-21 of the noise's standard deviation."""
    return float(2.0 ** (math.floor(math.log2(noise_std)) - _GRID_BITS))


def noised(clipped_sum: torch.Tensor, plan: PrivacyPlan, streams: Streams, step: int, name: str) -> torch.Tensor:
    """The sum of clipped gradients of one parameter with the plan's noise, on the grid, as float32.

    Args:
        clipped_sum: sum over the batch of this parameter's clipped gradients, any shape.
        plan: gives sigma * C.
        streams: the charge's random streams.
        step: step within the charge.
        name: the parameter's name.
    """
    generator = streams.generator("noise", step, name)
    draws = sum(generator.standard_normal(tuple(clipped_sum.shape)) for _ in range(4))
    noise = torch.from_numpy(np.asarray(draws) * (plan.noise_std / 2)).to(clipped_sum.device)
    spacing = grid(plan.noise_std)
    return ((clipped_sum.double() + noise) / spacing).round().mul(spacing).float()
