"""Shamir's secret sharing, byte by byte over GF(2^8), so that a table does the arithmetic of a whole share at once.

Any ``threshold`` shares give the secret; fewer are independent of it, whatever the computing power (Shamir 1979). The
field is that of AES, x^8 + x^4 + x^3 + x + 1. Shares carry no proof: whoever combines them compares the secret with
what was promised.
"""

import secrets
from collections.abc import Mapping
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
MOST_HOLDERS = 255  # points of GF(2^8) other than zero, where the secret is


def split(secret: bytes, threshold: int, holders: int) -> list[bytes]:
    """Shares of the holders 1, 2, ..., each as long as the secret."""
    if not 1 <= threshold <= holders <= MOST_HOLDERS:
        raise ValueError(f"{threshold} of {holders} shares: the most are {MOST_HOLDERS}")
    drawn = np.frombuffer(secrets.token_bytes((threshold - 1) * len(secret)), np.uint8)
    polynomial = np.concatenate([np.frombuffer(secret, np.uint8)[None], drawn.reshape(threshold - 1, len(secret))])
    return [row.tobytes() for row in evaluate(polynomial, np.arange(1, holders + 1))]


def evaluate(polynomial: Bytes, points: NDArray[np.integer]) -> Bytes:
    """One polynomial for each byte, its constant first, at all points: (coefficients, bytes) to (points, bytes)."""
    values = np.zeros((len(points), polynomial.shape[1]), np.uint8)
    for coefficients in polynomial[::-1]:
        values = _products()[points[:, None], values] ^ coefficients
    return values


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret, of exactly ``threshold`` shares by their holders' numbers."""
    weights = _weights(tuple(shares))
    rows = np.stack([np.frombuffer(share, np.uint8) for share in shares.values()])
    found: bytes = np.bitwise_xor.reduce(_products()[weights[:, None], rows], axis=0).tobytes()
    return found


@lru_cache(maxsize=1024)
def _weights(points: tuple[int, ...]) -> Bytes:
    """Lagrange's weights at zero: the products over m of x_m / (x_j - x_m), where subtraction is XOR."""
    if not all(1 <= point <= MOST_HOLDERS for point in points):
        raise ValueError("a share's number lies outside of the field")
    powers, logarithms = _tables()
    xs = np.array(points)
    differences = xs[:, None] ^ xs[None, :]
    np.fill_diagonal(differences, 1)  # whose logarithm is zero
    exponents = logarithms[xs].sum() - logarithms[xs] - logarithms[differences].sum(axis=1)
    weights: Bytes = powers[exponents % 255]
    return weights


@cache
def _tables() -> tuple[Bytes, NDArray[np.int64]]:
    """The powers of the generator 3, and the logarithms to it."""
    powers, logarithms = np.zeros(255, np.uint8), np.zeros(256, np.int64)
    value = 1
    for exponent in range(255):
        powers[exponent], logarithms[value] = value, exponent
        doubled = value << 1 ^ (0x11B if value & 0x80 else 0)
        value ^= doubled
    return powers, logarithms


@cache
def _products() -> Bytes:
    powers, logarithms = _tables()
    table: Bytes = powers[(logarithms[:, None] + logarithms[None, :]) % 255]
    table[0], table[:, 0] = 0, 0
    return table
