"""Shamir's sharing: against arithmetic written out, and what fewer shares than the threshold tell."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.secagg.sharing import combine, evaluate, split


def product(left, right):
    """In GF(2^8), bit by bit: the textbook's way."""
    found = 0
    while right:
        if right & 1:
            found ^= left
        left, right = left << 1, right >> 1
        if left & 0x100:
            left ^= 0x11B
    return found


@given(st.lists(st.integers(0, 255), min_size=1, max_size=6), st.integers(1, 255))
def test_a_polynomial_has_the_textbooks_values(coefficients, point):
    expected, power = 0, 1
    for coefficient in coefficients:
        expected ^= product(coefficient, power)
        power = product(power, point)
    found = evaluate(np.array(coefficients, np.uint8)[:, None], np.array([point]))
    assert found.tolist() == [[expected]]


@given(st.binary(min_size=32, max_size=32), st.integers(1, 255), st.data())
def test_any_threshold_shares_give_the_secret(secret, holders, data):
    threshold = data.draw(st.integers(1, holders))
    shares = split(secret, threshold, holders)
    chosen = data.draw(st.permutations(range(1, holders + 1)))[:threshold]
    assert combine({number: shares[number - 1] for number in chosen}) == secret


def test_fewer_shares_are_as_likely_under_every_secret():
    """All 65,536 polynomials of degree 2 for each secret: two shares take each pair of values exactly once."""
    random = np.array(list(itertools.product(range(256), repeat=2)), np.uint8).T
    for secret in (0, 1, 0xA7):
        polynomials = np.concatenate([np.full((1, random.shape[1]), secret, np.uint8), random])
        shares = evaluate(polynomials, np.array([3, 200]))
        counts = Counter(zip(*shares.tolist(), strict=True))
        assert len(counts) == 65_536 and set(counts.values()) == {1}


def test_fewer_shares_do_not_combine_to_the_secret():
    secret = bytes(range(32))
    shares = split(secret, 4, 6)
    assert combine({number: shares[number - 1] for number in (1, 2, 3)}) != secret


def test_two_splits_of_one_secret_have_nothing_in_common():
    assert not set(split(bytes(32), 3, 9)) & set(split(bytes(32), 3, 9))


@pytest.mark.parametrize(("threshold", "holders"), [(0, 3), (4, 3), (2, 256)])
def test_impossible_sharings_are_refused(threshold, holders):
    with pytest.raises(ValueError, match="shares"):
        split(bytes(32), threshold, holders)


def test_a_share_at_zero_would_be_the_secret_and_is_refused():
    with pytest.raises(ValueError, match="outside"):
        combine({0: bytes(32), 1: bytes(32)})
