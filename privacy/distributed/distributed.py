"""A silo's share of the noise, and its vector with that share as integers that a secure sum can add.

All of it is in steps of a grid: sigma C / (sqrt(min_honest) 2^b), so that a share is a discrete Gaussian with a
standard deviation of 2^b steps, and ``min_honest`` of them have a variance of sigma^2 C^2. b is the largest with which
the sum of all silos' vectors fits the words with ten deviations of noise.

A vector is brought into a ball of radius ``reach``, written as integers of 2^-30 steps, and rounded to whole steps with
a dither: floor(x + u), with u uniform. Everything after the division by the step is in integers. The roundings of two
vectors with one dither differ by a stochastic rounding of their difference, which is why this serves sums over records
as well as a vector that is one unit; ``privacy.distributed.guarantee`` bounds it.
"""

from dataclasses import dataclass
from functools import cached_property
from math import isfinite, sqrt

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError, SiloweaveError
from privacy.distributed.discrete_gaussian import LARGEST_BITS, discrete_gaussian
from privacy.secagg.encoding import WORD_TYPES, Words

FRACTION_BITS = 30  # of a step, before rounding
_SMALLEST_BITS = 2  # the guarantee is proven for shares with a deviation of 4 steps or more
_DEVIATIONS = 10  # of the noise, for which there is room in a word
_LIMITS = {"noise_multiplier": (1e-3, 1e6), "clip": (1e-100, 1e100), "reach": (1e-100, 1e120)}


class TooFewShares(SiloweaveError):
    """So few silos are left that less noise than was charged may be in their sum: it must not be unmasked."""


class NotFinite(SiloweaveError):
    """A silo's sum over records is not finite, and no vector in its place would be as near to its neighbours."""


@dataclass(frozen=True)
class DistributedNoise:
    """One noised sum over silos: the same object on every silo and at the server.

    Attributes:
        noise_multiplier: sigma; ``min_honest`` shares together have the standard deviation sigma * C.
        clip: C, how far one unit moves a silo's vector at most (2-norm): the norm of a record's clipped gradient where
            the vector is a sum over records; the norm to which the vector itself is clipped where a silo is the unit.
        reach: norm of a silo's whole vector: C where a silo is the unit; for a sum over records more, since a longer
            sum is shortened. That brings no two vectors farther apart, and costs utility alone.
        silos: most vectors in a sum.
        min_honest: silos of which it is assumed that they add their shares and tell nobody; that many are charged for.
        colluders: silos of which it is assumed that they tell, or add no noise.
        dimension: values in a vector.
        word_bits: k of the secure sum's integers modulo 2^k: 16 or 32.
    """

    noise_multiplier: float
    clip: float
    reach: float
    silos: int
    min_honest: int
    colluders: int
    dimension: int
    word_bits: int = 32

    def __post_init__(self) -> None:
        """Refuses what no sum could keep."""
        for name, (least, most) in _LIMITS.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise InputError(f"{name} = {value}: give {least:g} to {most:g}")
        if self.reach < self.clip:
            raise InputError(f"reach = {self.reach}: give at least the clip, {self.clip}")
        if self.word_bits not in WORD_TYPES:
            raise InputError(f"word_bits = {self.word_bits}: give {' or '.join(map(str, WORD_TYPES))}")
        if not 1 <= self.dimension <= 2**31:
            raise InputError(f"dimension = {self.dimension}: give 1 to {2**31}")
        self._check_silos()
        _ = self.share_bits  # raises where there is none

    def _check_silos(self) -> None:
        if self.min_honest < 1 or self.colluders < 0:
            raise InputError(
                f"min_honest = {self.min_honest} and colluders = {self.colluders}: give at least 1, and at least 0"
            )
        if not self.min_survivors <= self.silos < 2**15:
            raise InputError(
                f"min_honest = {self.min_honest} with {self.colluders} colluders: that needs {self.min_survivors} "
                f"silos, and there are {self.silos} (at most {2**15 - 1}); lower one, or enrol more silos"
            )

    @property
    def unit_is_silo(self) -> bool:
        """Whether a silo's whole vector is one unit's."""
        return self.reach == self.clip

    @property
    def min_survivors(self) -> int:
        """With fewer vectors a sum may lack noise: whoever gathers the sum has to ask for so many at least."""
        return self.min_honest + self.colluders

    def require(self, survivors: int) -> None:
        """To be called before a silo reveals anything that unmasks a sum.

        Raises:
            TooFewShares: ``min_honest`` shares may not be in the sum.
        """
        if survivors < self.min_survivors:
            raise TooFewShares(
                f"{survivors} silos are left; {self.min_honest} honest ones beside {self.colluders} colluders have to "
                "be, so that the noise is what was charged"
            )

    @cached_property
    def share_bits(self) -> int:
        """b: a share's standard deviation is 2^b steps."""
        room = 2.0 ** (self.word_bits - 1) - 1
        for bits in range(LARGEST_BITS, _SMALLEST_BITS - 1, -1):
            reach = self.reach / self._step(bits)
            if self.silos * (reach + 2) + _DEVIATIONS * 2.0**bits * sqrt(self.silos) <= room:
                return bits
        noised = f"a sum of {self.silos} silos and its noise does not fit {self.word_bits} bits"
        raise InputError(f"reach = {self.reach}: {noised}; lower it, or give more word_bits or noise_multiplier")

    @property
    def step(self) -> float:
        """What 1 stands for in the sum."""
        return self._step(self.share_bits)

    def _step(self, bits: int) -> float:
        return self.noise_multiplier * self.clip / (sqrt(self.min_honest) * 2.0**bits)

    def encode(self, vector: NDArray[np.floating], generator: np.random.Generator) -> Words:
        """What a silo hands to the secure sum: its vector, rounded, with its share of the noise, modulo 2^k.

        Args:
            vector: exact in float64; shape (dimension,). A silo that is the unit may hand in any values: they are
                clipped here, and count as zeros where one is not finite. A sum over records has to be finite.
            generator: a stream of this silo's charge, for this sum alone.

        Raises:
            InputError: the vector has another shape.
            NotFinite: it is a sum over records with a value that is not finite.
        """
        if np.shape(vector) != (self.dimension,):
            raise InputError(f"a vector has shape {np.shape(vector)}: the plan has ({self.dimension},)")
        steps = self._within_reach(np.asarray(vector, np.float64)) / self.step
        steps *= 2.0**FRACTION_BITS  # exact
        integers = np.rint(steps, out=steps).astype(np.int64)
        integers += generator.integers(1 << FRACTION_BITS, size=self.dimension)
        integers >>= FRACTION_BITS  # floor, of negative integers too
        integers += discrete_gaussian(self.share_bits, self.dimension, generator)
        return integers.astype(WORD_TYPES[self.word_bits])

    def _within_reach(self, vector: NDArray[np.float64]) -> NDArray[np.float64]:
        """The nearest vector of norm at most ``reach``: a projection, and so no two come farther apart by it."""
        largest = float(np.abs(vector).max())
        if not isfinite(largest):
            if not self.unit_is_silo:
                raise NotFinite("a silo's sum over records has a value that is not finite: nothing was sent of it")
            return np.zeros_like(vector)
        if largest == 0:
            return vector
        unit = vector / largest  # its squares neither overflow nor all vanish
        norm = sqrt(float(np.square(unit).sum()))
        return vector if largest * norm <= self.reach else unit * (self.reach / norm)

    def decode(self, words: Words) -> NDArray[np.float64]:
        """What a sum of encoded vectors stands for."""
        return words.view(f"<i{self.word_bits // 8}").astype(np.float64) * self.step

    def rounding_bound(self, summed: int) -> float:
        """The most by which rounding moves a value in a decoded sum of so many vectors; its mean over dithers is 0.

        The vectors are those within reach. The noise comes on top.
        """
        return summed * (self.step * (1 + 2.0**-FRACTION_BITS) + self.reach * 2.0**-40)

    def noise_std(self, summed: int) -> float:
        """Standard deviation of the noise in a decoded sum of so many vectors, all with their shares."""
        return sqrt(summed) * 2.0**self.share_bits * self.step

    def wrap_bound(self, summed: int) -> float:
        """An upper bound on the probability that any value of a sum wraps around.

        Wrapping is post-processing and costs no privacy. Without noise no sum can wrap: the room is reserved. A
        discrete Gaussian is subgaussian with sigma^2 (Canonne, Kamath, Steinke 2020), and so is a sum of them.
        """
        if summed > self.silos:
            return 1.0
        return min(1.0, 2 * self.dimension * float(np.exp(-(_DEVIATIONS**2) * self.silos / (2 * summed))))
