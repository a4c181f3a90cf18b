"""Exact draws of the discrete Gaussian N_Z(0, 4^bits), by integers alone (Canonne, Kamath, Steinke 2020).

The probability of y is proportional to exp(-y^2 / 2 sigma^2), with sigma = 2^bits. All probabilities on the way are
exp of a fraction over a power of two, so that comparing uniform integers decides them, without rounding. The paper's
algorithms run on many candidates at once; what is rejected is drawn again.
"""

import numpy as np
from numpy.typing import NDArray

LARGEST_BITS = 21  # squares below stay within 63 bits, but for a geometric draw above 1,000: chance exp(-1000)
_BLOCK = 2**16  # candidates at once: they stay in the processor's cache
_SPARE = 3  # candidates for each draw that is left: half of them are rejected

Integers = NDArray[np.int64]
Truths = NDArray[np.bool_]


def discrete_gaussian(bits: int, size: int, generator: np.random.Generator) -> Integers:
    """Independent draws.

    Args:
        bits: sigma is 2^bits; 0 to 21.
        size: how many.
        generator: uniform integers, from a cryptographic stream where the draws protect anything.

    Raises:
        ValueError: bits is out of range.
    """
    if not 0 <= bits <= LARGEST_BITS:
        raise ValueError(f"bits is {bits}: give 0 to {LARGEST_BITS}")
    drawn = np.empty(size, np.int64)
    filled = 0
    while filled < size:
        left = size - filled
        accepted = _candidates(bits, min(_SPARE * left + _SPARE, _BLOCK), generator)[:left]
        drawn[filled : filled + len(accepted)] = accepted
        filled += len(accepted)
    return drawn


def _candidates(bits: int, count: int, generator: np.random.Generator) -> Integers:
    """At most ``count`` draws: algorithm 3, with the discrete Laplace's scale t = sigma."""
    laplace = _discrete_laplace(bits, count, generator)
    beyond = np.abs(laplace) - (1 << bits)
    return laplace[_bernoulli_exp(beyond * beyond, 2 * bits + 1, generator)]


def _discrete_laplace(bits: int, count: int, generator: np.random.Generator) -> Integers:
    """At most ``count`` draws with probabilities proportional to exp(-abs(y) / 2^bits): algorithm 2."""
    low = generator.integers(1 << bits, size=count)
    low = low[_bernoulli_exp(low, bits, generator)]
    size = low + (_geometric(len(low), generator) << bits)
    negative: Truths = generator.integers(2, size=len(size)) == 1
    signed: Integers = np.where(negative, -size, size)
    return signed[~negative | (size > 0)]  # a zero counts once


def _geometric(count: int, generator: np.random.Generator) -> Integers:
    """How often in a row an event of probability exp(-1) happens."""
    times = np.zeros(count, np.int64)
    running = np.arange(count)
    while len(running):
        running = running[_bernoulli_exp_below_1(np.ones(len(running), np.int64), 0, generator)]
        times[running] += 1
    return times


def _bernoulli_exp(numerators: Integers, bits: int, generator: np.random.Generator) -> Truths:
    """Truths of probability exp(-numerator / 2^bits), numerators of any size: algorithm 1."""
    whole = numerators >> bits
    truths = _bernoulli_exp_below_1(numerators - (whole << bits), bits, generator)
    open_ = np.flatnonzero(truths & (whole > 0))
    truths[open_] = _geometric(len(open_), generator) >= whole[open_]  # of probability exp(-whole)
    return truths


def _bernoulli_exp_below_1(numerators: Integers, bits: int, generator: np.random.Generator) -> Truths:
    """The same for fractions of 0 to 1: algorithm 1's loop, in which k events of probability g / k end it."""
    truths = np.ones(len(numerators), np.bool_)
    running = np.arange(len(numerators))
    k = 1
    while len(running):
        running = running[generator.integers(1 << bits, size=len(running)) < numerators[running]]
        running = running[generator.integers(k, size=len(running)) == 0]
        truths[running] ^= True
        k += 1
    return truths
