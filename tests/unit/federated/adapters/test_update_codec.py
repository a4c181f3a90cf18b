"""Updates rounded for the way: how far off they are, and what is refused of bytes that strangers chose."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from federated.adapters.arrays import to_bytes
from federated.adapters.update_codec import BYTES_OF, UPDATE_DTYPES, decoded, encoded

ROOM = 2**20
SHAPES = {"a.lora_A.weight": (3, 5), "a.lora_B.weight": (7, 3), "empty": (0, 4), "one": (1,), "zero": (6,)}


def update(seed=0, scale=1.0):
    drawn = np.random.default_rng(seed)
    arrays = {name: (scale * drawn.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}
    return {**arrays, "zero": np.zeros(6, np.float32)}


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 3e4])
@pytest.mark.parametrize("seed", range(5))
def test_how_far_off_a_rounded_update_is(seed, scale):
    """The bounds that the documents state."""
    before = update(seed, scale)
    for dtype in UPDATE_DTYPES:
        after = decoded(encoded(before, dtype), dtype, ROOM)
        assert {name: (array.shape, array.dtype) for name, array in after.items()} == {
            name: (array.shape, np.dtype(np.float32)) for name, array in before.items()
        }
        for name, array in before.items():
            off = np.abs(after[name].astype(np.float64) - array)
            largest = np.abs(array).max(initial=0)
            most = {"float32": 0 * array, "bfloat16": np.abs(array) * 2.0**-8, "int8": largest / 254 * (1 + 1e-5)}
            assert (off <= most[dtype]).all()


def test_bfloat16_is_rounded_as_torch_reads_it():
    before = update()
    after = decoded(encoded(before, "bfloat16"), "bfloat16", ROOM)
    for name, array in before.items():
        assert np.array_equal(after[name], torch.from_numpy(array).to(torch.bfloat16).float().numpy())


def test_what_travels_is_as_short_as_it_is_called():
    before = {"a": np.ones((100, 100), np.float32)}
    for dtype in UPDATE_DTYPES:
        assert 0 <= len(encoded(before, dtype)) - 10_000 * BYTES_OF[dtype] < 200


@pytest.mark.parametrize("dtype", UPDATE_DTYPES)
def test_equal_updates_have_equal_bytes_and_rounding_again_changes_nothing(dtype):
    before = update()
    once = encoded(before, dtype)
    assert encoded(dict(reversed(before.items())), dtype) == once
    assert encoded({name: np.asfortranarray(array) for name, array in before.items()}, dtype) == once
    if dtype == "bfloat16":
        assert encoded(decoded(once, dtype, ROOM), dtype) == once


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", UPDATE_DTYPES)
def test_what_is_not_finite_stays_so(dtype, value):
    """Whoever folds it refuses it; a value that turned finite would be folded."""
    broken = update()
    broken["a.lora_A.weight"][1, 2] = value
    after = decoded(encoded(broken, dtype), dtype, ROOM)
    assert not np.isfinite(after["a.lora_A.weight"]).all()
    assert np.isfinite(after["a.lora_B.weight"]).all()


def test_the_smallest_values_of_all():
    tiny = {"a": np.array([1e-45, -1e-45, 0], np.float32)}
    for dtype in UPDATE_DTYPES:
        assert np.abs(decoded(encoded(tiny, dtype), dtype, ROOM)["a"] - tiny["a"]).max() <= 1e-45


INT8, SCALE = np.ones(4, np.int8), np.array(0.5, np.float32)


@pytest.mark.parametrize(
    ("content", "dtype"),
    [
        (b"", "bfloat16"),
        (b"\xff" * 40, "int8"),
        (to_bytes({"a": np.ones(4, np.float32)}), "bfloat16"),
        (to_bytes({"a": np.ones(4, np.float32)}), "int8"),
        (save({"a": INT8}), "float32"),
        (save({"a": INT8}), "int8"),
        (save({"a scale": SCALE}), "int8"),
        (save({"a": INT8, "b scale": SCALE}), "int8"),
        (save({"a": INT8, "a scale": np.ones(4, np.float32)}), "int8"),
        (save({"a": INT8, "a scale": INT8}), "int8"),
        (save({"a": SCALE, "a scale": SCALE}), "int8"),
        (save({"a": INT8, "a scale": SCALE, "a scale scale": SCALE}), "int8"),
        (save({"a": np.ones(4, np.float64)}), "bfloat16"),
    ],
)
def test_bytes_that_are_no_such_update(content, dtype):
    with pytest.raises(ValueError, match=r"not safetensors|is F|is I|not int8"):
        decoded(content, dtype, ROOM)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_an_update_that_grows_beyond_its_request_is_refused_before_it_grows(dtype):
    content = encoded({"a": np.ones(2**16, np.float32)}, dtype)
    with pytest.raises(ValueError, match="as float32, one to this request has at most 131072"):
        decoded(content, dtype, 2**17)
