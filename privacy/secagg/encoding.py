"""Real vectors as integers modulo 2^k, in a range that a sum over all silos can't leave.

A value x with abs(x) <= C becomes round(x * L / C), an integer in [-L, L] with L = floor((2^(k-1) - 1) / silos). A
sum of at most ``silos`` of them lies in [-(2^(k-1) - 1), 2^(k-1) - 1], where two's complement is exact: it can't
wrap. Rounding to the nearest moves each value by at most half a step, C / 2L, and so a sum of m silos by at most m *
C / 2L, but for float64's own rounding, which ``error_bound`` includes.
"""

from dataclasses import dataclass
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from privacy.secagg.failures import OutOfRange

Words = NDArray[np.unsignedinteger]
WORD_TYPES: dict[int, np.dtype[np.unsignedinteger]] = {16: np.dtype("<u2"), 32: np.dtype("<u4")}


@dataclass(frozen=True)
class Encoding:
    """How one silo's values travel.

    Attributes:
        clip: largest absolute value, C.
        silos: most vectors that are ever summed.
        word_bits: k, 16 or 32.
    """

    clip: float
    silos: int
    word_bits: int = 32

    def __post_init__(self) -> None:
        """Refuses what can't be encoded."""
        if self.word_bits not in WORD_TYPES:
            raise InputError(f"word_bits = {self.word_bits}: give {' or '.join(map(str, WORD_TYPES))}")
        if not (isfinite(self.clip) and self.clip >= 1e-150):  # below, C / L may lose digits or vanish
            raise InputError(f"clip = {self.clip}: give a number of at least 1e-150")
        if not 1 <= self.silos <= 2 ** (self.word_bits - 1) - 1:
            raise InputError(f"silos = {self.silos}: a sum of so many does not fit {self.word_bits} bits")

    @property
    def dtype(self) -> "np.dtype[np.unsignedinteger]":
        """The words' type, little-endian: its arithmetic is that modulo 2^k."""
        return WORD_TYPES[self.word_bits]

    @property
    def largest(self) -> int:
        """L, the largest integer of one silo."""
        return int((2 ** (self.word_bits - 1) - 1) // self.silos)

    def error_bound(self, summed: int) -> float:
        """The most by which a decoded sum of so many vectors differs from the exact sum of their values."""
        return summed * self.clip * (0.5 / self.largest + 2.0**-50)

    def encode(self, values: NDArray[np.floating]) -> Words:
        """A vector as words.

        Raises:
            OutOfRange: a value is not finite, or larger than the clip.
        """
        exact = np.asarray(values, np.float64)
        if not np.all(np.abs(exact) <= self.clip):  # false of NaN, too
            raise OutOfRange(f"a value is not finite or exceeds the clip of {self.clip}: clip before encoding")
        return np.rint(exact / self.clip * self.largest).astype(np.int64).astype(self.dtype)

    def decode(self, words: Words) -> NDArray[np.float64]:
        """What a sum of words stands for."""
        return words.view(np.dtype(f"<i{self.word_bits // 8}")).astype(np.float64) * self.clip / self.largest
