"""What a silo hands to a secure sum: range, error, neighbours, noise, and what is refused."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secure_sum import SecureSum, agreement_of, signers

from configs.errors import InputError
from privacy.distributed.distributed import DistributedNoise, NotFinite, TooFewShares
from privacy.distributed.guarantee import sensitivity
from privacy.mechanism.streams import Streams
from privacy.secagg.encoding import Encoding
from privacy.secagg.messages import Phase

STREAMS = Streams(bytes(range(32)), "44" * 32)
RECORDS = DistributedNoise(1.0, 0.5, 40.0, silos=8, min_honest=5, colluders=1, dimension=40)
SILOS = replace(RECORDS, reach=0.5)


def stream(silo=0):
    return STREAMS.generator("share", 0, f"silo-{silo}")


def signed(words):
    return words.view(f"<i{words.itemsize}").astype(np.int64)


def difference(noise, left, right, silo=0):
    """In steps, with one dither and the same noise under both."""
    words = noise.encode(left, stream(silo)) - noise.encode(right, stream(silo))
    return signed(words)


def of_norm(rng, dimension, norm):
    vector = rng.normal(size=dimension)
    return vector * (norm / np.linalg.norm(vector))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.sampled_from([16, 32]), st.floats(1.0, 30.0), st.floats(0.0, 3.0), st.integers(0, 2**32))
def test_neighbours_stay_as_near_as_is_charged(dimension, word_bits, reach, length, seed):
    """Also where the sum is so long that it is shortened. The dither is random: a chance of 1e-12 is left."""
    noise = DistributedNoise(2.0, 1.0, reach, 4, 3, 0, dimension, word_bits)
    rng = np.random.default_rng(seed)
    sum_ = of_norm(rng, dimension, reach * length)
    moved = difference(noise, sum_ + of_norm(rng, dimension, 1 - 1e-12), sum_, seed)
    assert np.linalg.norm(moved) <= sensitivity(noise, 1e-12)


@pytest.mark.parametrize("failure", [0.5, 0.1, 1e-3])
@pytest.mark.parametrize("scale", [0.4, 3.0, 40.0])
def test_rounding_lengthens_a_difference_no_more_often_than_is_charged(failure, scale):
    """The probability over all roundings of ten values, exactly."""
    noise = replace(SILOS, dimension=10, word_bits=16, noise_multiplier=np.sqrt(5) * 1024 / scale)
    clip = noise.clip / noise.step
    assert clip == pytest.approx(scale)
    bound = sensitivity(noise, failure)
    rng = np.random.default_rng(3)
    for vector in (np.full(10, clip / np.sqrt(10)), *(of_norm(rng, 10, clip) for _ in range(5))):
        low, up = np.floor(vector), vector - np.floor(vector)
        beyond = sum(
            np.prod(np.where(choice, up, 1 - up))
            for choice in product((False, True), repeat=10)
            if np.linalg.norm(low + choice) > bound
        )
        assert beyond <= failure


@pytest.mark.parametrize("word_bits", [16, 32])
def test_a_sum_errs_by_no_more_than_is_promised(word_bits):
    noise = replace(RECORDS, word_bits=word_bits)
    rng = np.random.default_rng(5)
    vectors = [of_norm(rng, 40, 30.0) for _ in range(noise.silos)]
    rounded = sum(difference(noise, vector, np.zeros(40), silo) for silo, vector in enumerate(vectors))
    assert np.abs(rounded * noise.step - sum(vectors)).max() <= noise.rounding_bound(noise.silos)


def test_rounding_is_right_in_the_mean():
    noise = replace(RECORDS, word_bits=16, dimension=20_000)
    vector = np.full(20_000, 0.3 * noise.step)
    found = difference(noise, vector, np.zeros(20_000))
    assert set(found.tolist()) == {0, 1}
    assert abs(found.mean() - 0.3) < 7 * np.sqrt(0.21 / 20_000)  # a chance below 1e-11, and the stream is fixed


@pytest.mark.parametrize("word_bits", [16, 32])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sum_of_all_silos_does_not_wrap(word_bits, sign):
    noise = DistributedNoise(1.0, 1.0, 20.0, 12, 9, 2, 64, word_bits)
    longest = np.zeros(64)
    longest[7] = sign * 1e9  # shortened to the reach
    total = sum((noise.encode(longest, stream(silo)) for silo in range(12)), np.zeros(64, f"<u{word_bits // 8}"))
    expected = np.zeros(64)
    expected[7] = sign * 12 * noise.reach
    assert np.abs(noise.decode(total) - expected).max() < 7 * noise.noise_std(12) + noise.rounding_bound(12)
    assert noise.wrap_bound(12) < 1e-18


def test_min_honest_shares_have_the_noise_that_is_charged():
    noise = replace(RECORDS, dimension=50_000)
    total = sum(noise.encode(np.zeros(50_000), stream(silo)) for silo in range(noise.min_honest))
    wanted = noise.noise_multiplier * noise.clip
    assert noise.noise_std(noise.min_honest) == pytest.approx(wanted, rel=1e-12)
    assert noise.decode(total).std() == pytest.approx(wanted, rel=7 / np.sqrt(2 * 50_000))
    shares = [noise.decode(noise.encode(np.zeros(50_000), stream(silo))) for silo in (0, 1)]
    assert abs(np.corrcoef(*shares)[0, 1]) < 7 / np.sqrt(50_000)


def test_a_secure_sum_of_the_survivors_decodes_to_theirs(tmp_path):
    keys = signers(tmp_path, 5)
    noise = DistributedNoise(0.5, 1.0, 1.0, silos=5, min_honest=3, colluders=1, dimension=7)
    agreement = agreement_of(
        keys, length=7, encoding=Encoding(1.0, 5), colluders=noise.colluders, min_survivors=noise.min_survivors
    )
    running = SecureSum.of(keys, agreement, {Phase.MASKED: {next(iter(keys))}})
    rng = np.random.default_rng(2)
    vectors = {name: of_norm(rng, 7, 0.9) for name in keys}
    running.words = {name: noise.encode(vector, stream(name)) for name, vector in vectors.items()}
    total = running.total()
    noise.require(len(running.server.survivors))
    plain = sum(vectors[name] for name in running.server.survivors)
    assert np.abs(noise.decode(total) - plain).max() < 8 * noise.noise_std(4)
    assert np.array_equal(total, sum(running.words[name] for name in running.server.survivors))


@pytest.mark.parametrize("value", [1e9, -1e300, 1.7e308])
def test_a_silo_that_is_the_unit_moves_the_sum_by_no_more_than_its_clip(value):
    vector = np.full(40, value)
    assert np.linalg.norm(difference(SILOS, vector, np.zeros(40))) <= sensitivity(SILOS, 1e-12)
    direction = difference(SILOS, vector, np.zeros(40)) * SILOS.step
    assert direction == pytest.approx(np.sign(value) * np.full(40, 0.5 / np.sqrt(40)), abs=2 * SILOS.step)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_counts_as_zeros_of_a_unit_and_is_an_error_in_a_sum(value):
    vector = np.linspace(0.1, 0.2, 40)
    vector[3] = value
    assert np.array_equal(SILOS.encode(vector, stream()), SILOS.encode(np.zeros(40), stream()))
    with pytest.raises(NotFinite) as refused:
        RECORDS.encode(vector, stream())
    assert "nan" not in str(refused.value)
    assert "inf" not in str(refused.value).replace("finite", "")


@pytest.mark.parametrize("shape", [(39,), (40, 1), ()])
def test_another_shape_is_refused(shape):
    with pytest.raises(InputError, match=r"the plan has \(40,\)"):
        RECORDS.encode(np.ones(shape), stream())


def test_fewer_silos_than_the_noise_needs_are_refused():
    RECORDS.require(6)
    with pytest.raises(TooFewShares, match="5 silos are left; 5 honest ones beside 1 colluders"):
        RECORDS.require(5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_multiplier": 0.0}, "noise_multiplier"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier"),
        ({"clip": float("inf")}, "clip"),
        ({"clip": -1.0}, "clip"),
        ({"reach": 0.1}, "reach = 0.1: give at least the clip"),
        ({"word_bits": 8}, "word_bits"),
        ({"dimension": 0}, "dimension"),
        ({"min_honest": 0}, "min_honest = 0"),
        ({"colluders": -1}, "colluders = -1"),
        ({"min_honest": 8}, "needs 9 silos, and there are 8"),
        ({"silos": 2**15}, "at most 32767"),
        ({"reach": 1e9}, "does not fit 32 bits"),
        ({"word_bits": 16, "reach": 4000.0}, "does not fit 16 bits"),
    ],
)
def test_what_no_sum_could_keep_is_refused_in_one_line(change, message):
    with pytest.raises(InputError, match=message) as refused:
        replace(RECORDS, **change)
    assert "\n" not in str(refused.value)
