"""Masks: keystreams of AES-256 in counter mode, by keys that two silos, or one silo alone, know.

A key covers one mask of one round: it is derived (X25519, then HKDF-SHA256) with the round's digest as salt, so that
silos that were told different things have unrelated masks.
"""

from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from privacy.secagg.encoding import Words
from privacy.secagg.failures import ForgedMessage
from privacy.secagg.messages import pack

KEY_BYTES = 32
_PIECE_BYTES = 2**18  # of a keystream at once: it stays in the processor's cache


def derive(secret: bytes, digest: bytes, purpose: str, *names: str) -> bytes:
    """The key of one purpose in one round."""
    info = pack(b"siloweave secure aggregation 1", purpose.encode(), *(name.encode() for name in names))
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=digest, info=info).derive(secret)


def agreed_secret(own: X25519PrivateKey, peer: bytes) -> bytes:
    """What two silos know of each other's public keys.

    Raises:
        ForgedMessage: the peer's key is a point of small order, with which everybody would know the secret.
    """
    try:
        return own.exchange(X25519PublicKey.from_public_bytes(peer))
    except ValueError:
        raise ForgedMessage("a silo advertised a key with which there is no secret") from None


def pair_key(own: X25519PrivateKey, peer: bytes, digest: bytes, names: Iterable[str]) -> bytes:
    """The key of the mask between two silos: the same on both sides."""
    return derive(agreed_secret(own, peer), digest, "pair mask", *sorted(names))


def self_key(seed: bytes, digest: bytes, name: str) -> bytes:
    """The key of a silo's own mask."""
    return derive(seed, digest, "self mask", name)


def commitment(seed: bytes, digest: bytes, name: str) -> bytes:
    """What a silo promises its own mask's seed by; it tells nothing of a seed of 256 random bits."""
    return derive(seed, digest, "commitment", name)


def apply_mask(words: Words, key: bytes, sign: int) -> None:
    """Adds (sign 1) or subtracts (-1) a mask, in place."""
    cipher = Cipher(AES256(key), CTR(bytes(16))).encryptor()
    step = _PIECE_BYTES // words.itemsize
    zeros, stream = bytes(_PIECE_BYTES), bytearray(_PIECE_BYTES + 15)
    mask = np.frombuffer(stream, words.dtype, count=step)
    add = np.add if sign > 0 else np.subtract
    for start in range(0, len(words), step):
        piece = words[start : start + step]
        cipher.update_into(memoryview(zeros)[: piece.nbytes], stream)
        add(piece, mask[: len(piece)], out=piece)
