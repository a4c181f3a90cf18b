"""Which values of an update travel: their positions in few bits (Elias 1974, Fano 1971).

A position's low bits stand there as they are. The high ones are a bitmap in which each position is a 1 and each step
to the next high part a 0. Where one in 2^b values travels that is b + 2 bits each, half a bit above the least if few.
"""

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]
_BITS = 8  # of a byte


def positions_bytes(count: int, of: int) -> int:
    """Bytes of so many positions below ``of``."""
    return sum(-(-bits // _BITS) for bits in _bits(count, of))


def _low(count: int, of: int) -> int:
    """Number of low bits: what ``count`` positions are apart, as a power of two."""
    return (of // count).bit_length() - 1


def _bits(count: int, of: int) -> tuple[int, int]:
    """Of the low parts, and of the bitmap."""
    if not count:
        return 0, 0
    low = _low(count, of)
    return count * low, count + ((of - 1) >> low) + 1


def written(positions: Positions, of: int) -> npt.NDArray[np.uint8]:
    """Bytes of rising positions below ``of``."""
    count = len(positions)
    if not count:
        return np.zeros(0, np.uint8)
    low, (_, in_bitmap) = _low(count, of), _bits(count, of)
    parts = np.empty((count, low), np.uint8)
    for bit in range(low):
        parts[:, bit] = (positions >> (low - 1 - bit)) & 1
    bitmap = np.zeros(in_bitmap, np.uint8)
    bitmap[(positions >> low) + np.arange(count)] = 1
    return np.concatenate([np.packbits(parts), np.packbits(bitmap)])


def read(content: npt.NDArray[np.uint8], count: int, of: int) -> Positions:
    """The positions of bytes that a stranger chose, ``positions_bytes`` of them.

    Raises:
        ValueError: they are not ``count`` positions, one is out of range, or one comes twice.
    """
    if not count:
        return np.zeros(0, np.int64)
    low, (in_low, in_bitmap) = _low(count, of), _bits(count, of)
    ends = -(-in_low // _BITS)
    parts, bitmap = np.unpackbits(content[:ends]), np.unpackbits(content[ends:])
    ones = np.flatnonzero(bitmap)
    if len(ones) != count or parts[in_low:].any() or ones[-1] >= in_bitmap:
        raise ValueError(f"its positions are not {count}")
    found = ones - np.arange(count)
    for bit in range(low):
        found = (found << 1) | parts[bit:in_low:low]
    if found[-1] >= of:
        raise ValueError(f"its position {found[-1]} is out of range, its last value is {of - 1}")
    if (repeated := np.flatnonzero(np.diff(found) <= 0)).size:
        raise ValueError(f"its position {found[repeated[0]]} is repeated, or comes before a smaller one")
    return found
