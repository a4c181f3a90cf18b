"""Gaussian noise on a sum of clipped gradients, in float64, rounded to a public grid.

Naive floating-point Gaussian samples leave traces of the value under them (Mironov 2012). Two counter-measures: the
noise is a sum of four draws (Holohan and Braghin 2021, as in Opacus' secure mode), and the noised sum is rounded to
multiples of a power of two that depends on the plan alone.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from privacy.mechanism.streams import Streams

_GRID_BITS = 20
_BLOCK = 2**16  # elements per stream: a block that fits the processor's cache; threads share the blocks out
_TILE = 2**13


def grid(noise_std: float) -> float:
    """Spacing of the public grid: a power of two, 2^-20 to 2^-21 of the noise's standard deviation."""
    return float(2.0 ** (math.floor(math.log2(noise_std)) - _GRID_BITS))


def standard_normal(generator: np.random.Generator, size: int) -> npt.NDArray[np.float64]:
    """Standard normal values, each half the sum of four draws."""
    total, draw = np.empty(size), np.empty(size)
    generator.standard_normal(out=total)
    for _ in range(3):
        generator.standard_normal(out=draw)
        total += draw
    total *= 0.5
    return total


def noised(clipped_sum: torch.Tensor, noise_std: float, streams: Streams, step: int, name: str) -> torch.Tensor:
    """The sum of clipped gradients of one parameter with its noise, on the grid, as float32.

    Args:
        clipped_sum: sum over the batch of this parameter's clipped gradients, any shape; float64, so that it is exact.
        noise_std: standard deviation of the noise on the sum, from the plan.
        streams: the charge's random streams.
        step: step within the charge.
        name: the parameter's name.
    """
    sums = clipped_sum.detach().double().cpu().contiguous().numpy().reshape(-1)
    released = np.empty(len(sums), dtype=np.float32)

    def fill(start: int) -> None:
        generator = streams.generator("noise", step, f"{name}/{start}")
        for low in range(start, min(start + _BLOCK, len(sums)), _TILE):
            tile = slice(low, min(low + _TILE, start + _BLOCK, len(sums)))
            released[tile] = _on_grid(sums[tile], standard_normal(generator, len(sums[tile])), noise_std)

    starts = range(0, len(sums), _BLOCK)
    if len(starts) <= 1 or torch.get_num_threads() == 1:
        for start in starts:
            fill(start)
    else:  # numpy lets go of the interpreter's lock while it draws
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(fill, starts))
    return torch.from_numpy(released).view(clipped_sum.shape).to(clipped_sum.device)


def noised_sums(
    sums: npt.NDArray[np.float64], noise_std: float, streams: Streams, name: str
) -> npt.NDArray[np.float64]:
    """A vector of sums over units with its noise, on the grid.

    Args:
        sums: exact in float64: rounding them would change how far one unit can move them. Shape (K,).
        noise_std: standard deviation of the noise on each, from the plan and the vector's sensitivity.
        streams: the charge's random streams.
        name: what is summed.
    """
    return _on_grid(sums, standard_normal(streams.generator("metric", 0, name), len(sums)), noise_std)


def _on_grid(
    sums: npt.NDArray[np.floating[Any]], normal: npt.NDArray[np.float64], noise_std: float
) -> npt.NDArray[np.float64]:
    """Sum and noise on the grid, in place of the standard normal values."""
    spacing = grid(noise_std)
    normal *= noise_std
    normal += sums
    normal /= spacing  # exact: a power of two
    np.rint(normal, out=normal)
    normal *= spacing
    return normal
