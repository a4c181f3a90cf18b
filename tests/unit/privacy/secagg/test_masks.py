"""Masks: the documented keystream, added and taken off exactly."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import ECB

from privacy.secagg.failures import ForgedMessage
from privacy.secagg.masks import agreed_secret, apply_mask, commitment, pair_key, self_key

KEY = bytes(range(32))


@pytest.mark.parametrize("length", [1, 3, 4, 5, 2**16, 2**16 + 1, 200_003])
@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_a_mask_is_the_encrypted_counter(length, dtype):
    """AES of 0, 1, 2, ..., block by block, as SP 800-38A defines counter mode."""
    words = np.zeros(length, dtype)
    apply_mask(words, KEY, 1)
    blocks = -(-words.nbytes // 16)
    counters = b"".join(number.to_bytes(16, "big") for number in range(blocks))
    expected = Cipher(AES256(KEY), ECB()).encryptor().update(counters)
    assert words.tobytes() == expected[: words.nbytes]
    apply_mask(words, KEY, -1)
    assert not words.any()


def test_both_sides_have_one_key_and_each_digest_another():
    left, right = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    publics = [key.public_key().public_bytes_raw() for key in (left, right)]
    assert pair_key(left, publics[1], b"d", ("a", "b")) == pair_key(right, publics[0], b"d", ("b", "a"))
    assert pair_key(left, publics[1], b"d", ("a", "b")) != pair_key(left, publics[1], b"e", ("a", "b"))


def test_a_commitment_is_not_the_masks_key():
    assert len({self_key(KEY, b"d", "a"), commitment(KEY, b"d", "a"), commitment(KEY, b"d", "b"), KEY}) == 4


@pytest.mark.parametrize("point", [bytes(32), (1).to_bytes(32, "little")])
def test_a_point_of_small_order_is_refused(point):
    with pytest.raises(ForgedMessage, match="no secret"):
        agreed_secret(X25519PrivateKey.generate(), point)
