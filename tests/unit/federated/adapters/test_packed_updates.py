"""Updates in few bytes: how far off they are by exact arithmetic, and what is refused of bytes that strangers chose."""

from fractions import Fraction
from math import ceil, log2

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from federated.adapters.arrays import flat
from federated.adapters.packed_updates import packed, packed_bytes, unpacked
from federated.adapters.positions import positions_bytes, read, written
from privacy.compression import Compression

SHAPES = {"a.lora_A.weight": (3, 50), "a.lora_B.weight": (70, 3), "empty": (0, 4), "one": (1,), "zero": (60,)}
NUMBER = sum(int(np.prod(shape)) for shape in SHAPES.values())
WAYS = [
    Compression(dtype="int8", block=64),
    Compression(dtype="int4", block=16),
    Compression(dtype="float32", share=0.1),
    Compression(dtype="bfloat16", share=0.3),
    Compression(dtype="int8", block=16, share=0.05),
    Compression(dtype="int4", block=64, share=0.2),
    Compression(dtype="int4", block=64, share=1e-9),
]
OFF = {"float32": 0, "bfloat16": Fraction(1, 256), "int8": Fraction(1, 254), "int4": Fraction(1, 14)}


def update(seed=0, scale=1.0):
    drawn = np.random.default_rng(seed)
    arrays = {name: (scale * drawn.standard_t(3, size=shape)).astype(np.float32) for name, shape in SHAPES.items()}
    return {**arrays, "zero": np.zeros(60, np.float32)}


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e4])
@pytest.mark.parametrize("way", WAYS, ids=repr)
def test_how_far_off_a_packed_update_is(way, scale):
    """The bounds that the documents state, by fractions, which nothing rounds."""
    before = update(1, scale)
    content = packed(before, way)
    vector, after = flat(before), flat(unpacked(content, way, SHAPES))
    order = sorted(range(NUMBER), key=lambda at: (-abs(vector[at]), at))  # an oracle that knows no numpy
    chosen = sorted(order[: way.kept(NUMBER)])
    assert [at for at in range(NUMBER) if at not in set(chosen) and after[at]] == []
    for start in range(0, len(chosen), way.block or len(chosen)):
        block = chosen[start : start + (way.block or len(chosen))]
        largest = max(abs(Fraction(float(vector[at]))) for at in block)
        for at in block:
            value = Fraction(float(vector[at]))
            most = OFF[way.dtype] * (abs(value) if way.dtype == "bfloat16" else largest)
            assert abs(Fraction(float(after[at])) - value) <= most * (1 + Fraction(1, 10_000))


@pytest.mark.parametrize("way", WAYS, ids=repr)
def test_equal_updates_have_equal_bytes_and_as_many_as_are_said(way):
    before, content = update(), packed(update(), way)
    assert packed(dict(reversed(before.items())), way) == content
    assert packed({name: np.asfortranarray(array) for name, array in before.items()}, way) == content
    assert packed_bytes(way, NUMBER) - 320 < len(content) <= packed_bytes(way, NUMBER)
    again = unpacked(content, way, SHAPES)
    assert {name: (array.shape, array.dtype) for name, array in again.items()} == {
        name: (shape, np.dtype(np.float32)) for name, shape in SHAPES.items()
    }


def test_bfloat16_is_rounded_as_torch_rounds():
    way, before = Compression(dtype="bfloat16", share=0.999), update()
    rounded = torch.from_numpy(flat(before)).to(torch.bfloat16).float().numpy()
    after = flat(unpacked(packed(before, way), way, SHAPES))
    assert np.array_equal(after[after != 0], rounded[after != 0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("way", WAYS, ids=repr)
def test_what_is_not_finite_is_not_packed(way, value):
    broken = update()
    broken["a.lora_A.weight"][1, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        packed(broken, way)


def test_the_smallest_and_the_largest_values_of_all():
    for dtype, block in (("int8", 16), ("int4", 16)):
        way = Compression(dtype=dtype, block=block)
        for value in (1e-45, 3.4e38):
            before = {"a": np.array([value, -value, 0], np.float32)}
            after = unpacked(packed(before, way), way, {"a": (3,)})["a"]
            assert np.abs(after.astype(np.float64) - before["a"]).max() <= max(1e-44, value * float(OFF[dtype]))


@given(data=st.data(), of=st.integers(1, 3000))
def test_positions_come_back(data, of):
    rising = np.array(sorted(data.draw(st.sets(st.integers(0, of - 1), min_size=1))), np.int64)
    content = written(rising, of)
    assert np.array_equal(read(content, len(rising), of), rising)
    assert len(content) == positions_bytes(len(rising), of)
    assert 8 * len(content) <= len(rising) * (2 + log2(of / len(rising))) + 16


@given(data=st.data(), of=st.integers(1, 200))
def test_bytes_are_positions_or_refused_and_no_two_are_the_same_positions(data, of):
    count = data.draw(st.integers(1, of))
    size = positions_bytes(count, of)
    content = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), np.uint8)
    try:
        found = read(content, count, of)
    except ValueError:
        return
    assert np.array_equal(found, np.unique(found))
    assert len(found) == count
    assert found[0] >= 0
    assert found[-1] < of
    assert np.array_equal(written(found, of), content)


WAY = Compression(dtype="int4", block=16, share=0.5)
EIGHT = {"a": (10,)}


def changed(**parts):
    found = load(packed({"a": np.arange(1, 11, dtype=np.float32)}, WAY))
    return save({name: part for name, part in {**found, **parts}.items() if part is not None})


def positions(*given):
    return written(np.array(given, np.int64), 10)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not safetensors"),
        (b"\xff" * 40, "not safetensors"),
        (changed(values=None), "is not the plan's int4: expected are 3 values, 1 scales, 3 positions"),
        (changed(scales=None), "is not the plan's"),
        (changed(positions=None), "is not the plan's"),
        (changed(more=np.zeros(1, np.uint8)), "is not the plan's"),
        (changed(values=np.full(4, 0x88, np.uint8)), "is not the plan's"),
        (changed(values=np.full(3, 8, np.int8)), "is not the plan's"),
        (changed(scales=np.ones(2, np.float32)), "is not the plan's"),
        (changed(scales=np.ones((1, 1), np.float32)), "is not the plan's"),
        (changed(values=np.full(3, 0.5, np.float64)), "is F64"),
        (changed(values=np.array([0x88, 0x88, 0x89], np.uint8)), "none of the 15"),
        (changed(values=np.array([0x08, 0x88, 0x88], np.uint8)), "none of the 15"),
        (changed(scales=np.array([np.nan], np.float32)), "scale of the update is negative or not finite"),
        (changed(scales=np.array([np.inf], np.float32)), "scale of the update is negative or not finite"),
        (changed(scales=np.array([-1], np.float32)), "scale of the update is negative or not finite"),
        (changed(positions=np.zeros(3, np.uint8)), "its positions are not 5"),
        (changed(positions=np.full(3, 255, np.uint8)), "its positions are not 5"),
        (changed(positions=positions(1, 2, 3, 4, 4)), "position 4 is repeated"),
        (changed(positions=positions(1, 3, 2, 8, 9)), "position 3 is repeated, or comes before a smaller one"),
    ],
)
def test_bytes_that_are_no_such_update(content, said):
    with pytest.raises(ValueError, match=said):
        unpacked(content, WAY, EIGHT)


def test_a_position_out_of_range_is_refused_by_its_number():
    """With 4 of 9 a position has 1 low bit, and the last high part is of 8 and 9."""
    way = Compression(dtype="float32", share=0.4)
    parts = {"values": np.ones(4, np.float32), "positions": written(np.array([1, 2, 3, 9]), 9)}
    with pytest.raises(ValueError, match="position 9 is out of range, its last value is 8"):
        unpacked(save(parts), way, {"a": (3, 3)})


def test_an_update_of_other_arrays_is_refused_before_anything_is_made_of_it():
    for way in WAYS:
        content = packed(update(), way)
        for other in ({"a": (NUMBER + 1000,)}, {"a": (2**20, 2**10)}):
            with pytest.raises(ValueError, match="is not the plan's"):
                unpacked(content, way, other)


def test_a_share_is_of_one_value_at_least_and_of_all_at_most():
    for share, values in ((1e-12, 1), (0.001, 10), (0.999999, 3), (1.0, 5)):
        way = Compression(dtype="int8", block=16, share=share)
        assert way.kept(values) == max(1, ceil(share * values))
    assert Compression(dtype="int8", block=16, share=0.5).kept(0) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": "int8", "block": 0},
        {"dtype": "int4", "block": 15},
        {"dtype": "int4", "block": 2**16 + 1},
        {"dtype": "float32", "block": 64, "share": 0.5},
        {"dtype": "float32"},
        {"dtype": "bfloat16", "share": 1.0},
        {"dtype": "int8", "block": 64, "share": 0.0},
        {"dtype": "int8", "block": 64, "share": 1.1},
        {"dtype": "int8", "block": 64, "share": float("nan")},
        {"dtype": "int2", "block": 64},
        {"dtype": "int8", "block": 64, "levels": 3},
    ],
)
def test_what_is_no_compression(wrong):
    with pytest.raises(ValueError, match=r"block|share|no compression|dtype|levels"):
        Compression(**wrong)
