"""Cryptographic random streams: one for every (purpose, step, parameter), all from one charge's seed.

AES-128 in counter mode (randomgen), keyed by HKDF-SHA256 of the charge's 32-byte seed with the request's digest as
salt. So a repeated request repeats its noise exactly, and another request never shares any of it.
"""

import hmac
from collections.abc import Callable

import numpy as np
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from randomgen import AESCounter

SEED_BYTES = 32
_KEY_BYTES = 16


class Streams:
    """The random streams of one charge."""

    def __init__(self, seed: bytes, request_digest: str) -> None:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a charge's seed has {SEED_BYTES} bytes, got {len(seed)}")
        self._seed, self._salt = seed, bytes.fromhex(request_digest)

    def generator(self, purpose: str, step: int, name: str = "") -> np.random.Generator:
        """The stream of one purpose, step and parameter name."""
        info = f"siloweave/1/{purpose}/{step}/{name}".encode()
        key = HKDF(algorithm=SHA256(), length=_KEY_BYTES, salt=self._salt, info=info).derive(self._seed)
        return np.random.Generator(AESCounter(key=int.from_bytes(key, "little")))


def injected_seeds(secret: bytes | None, owner: str) -> Callable[[str], bytes] | None:
    """For tests: makes each request's seed from its digest and a known secret; None draws from the operating system."""
    if secret is None:
        return None
    return lambda digest: hmac.digest(secret, f"{owner}/{digest}".encode(), "sha256")[:SEED_BYTES]
