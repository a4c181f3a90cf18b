"""Values as words modulo 2^k: exact sums, a range that can't wrap, and the error that is promised."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import InputError
from privacy.secagg.encoding import Encoding
from privacy.secagg.failures import OutOfRange

clips = st.floats(1e-9, 1e9)
widths = st.sampled_from([16, 32])


@given(clips, widths, st.integers(1, 300), st.data())
def test_a_sum_errs_by_no_more_than_is_promised(clip, word_bits, silos, data):
    encoding = Encoding(clip, silos, word_bits)
    summed = data.draw(st.integers(1, min(silos, 8)))
    values = data.draw(
        st.lists(st.lists(st.floats(-clip, clip), min_size=3, max_size=3), min_size=summed, max_size=summed)
    )
    total = np.zeros(3, encoding.dtype)
    for vector in values:
        total += encoding.encode(np.array(vector))
    for found, column in zip(encoding.decode(total), zip(*values, strict=True), strict=True):
        exact = sum(map(Fraction, column))
        assert abs(Fraction(float(found)) - exact) <= Fraction(encoding.error_bound(summed))


@given(clips, widths, st.integers(1, 32_767), st.sampled_from([-1, 1]))
def test_the_largest_sum_of_all_silos_does_not_wrap(clip, word_bits, silos, sign):
    encoding = Encoding(clip, silos, word_bits)
    one = int(encoding.encode(np.array([sign * clip])).astype(np.uint64)[0])
    signed = one - 2**word_bits if one >= 2 ** (word_bits - 1) else one
    assert signed == sign * encoding.largest
    assert abs(silos * signed) <= 2 ** (word_bits - 1) - 1
    total = np.array([silos * signed % 2**word_bits], encoding.dtype)
    assert np.sign(encoding.decode(total)[0]) == sign


@pytest.mark.parametrize("value", [1.0000001, -2.0, float("nan"), float("inf"), float("-inf")])
def test_a_value_beyond_the_clip_is_refused_and_not_told(value):
    with pytest.raises(OutOfRange, match="clip before encoding") as refused:
        Encoding(1.0, 3).encode(np.array([0.0, value]))
    assert str(value) not in str(refused.value).replace("clip of 1.0", "")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((0.0, 3), "clip"),
        ((float("nan"), 3), "clip"),
        ((1.0, 0), "silos"),
        ((1.0, 3, 64), "word_bits"),
        ((1.0, 2**15, 16), "fit"),
    ],
)
def test_what_can_not_be_encoded_is_refused(asked, message):
    with pytest.raises(InputError, match=message):
        Encoding(*asked)
