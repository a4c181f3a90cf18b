"""Updates in few bytes at the coordinator: what becomes of them, and what a hostile silo's bytes come to."""

import json

import numpy as np
import pytest
from safetensors.numpy import load, save
from signed_silos import InProcess, SignedSilo, adapter, coordinator

from configs.errors import PolicyRefusal
from federated.adapters.arrays import flat, from_bytes, to_bytes
from federated.adapters.packed_updates import packed, unpacked
from federated.adapters.positions import written
from federated.coordinator import round_commits as commits
from federated.protocol.framing import COMPRESSED_VERSION, PROTOCOL_VERSION, ROUNDED_VERSION

SILOS = "federated.min_silos=1"
FEW = ("federated.update_dtype=int4", "federated.update_block=16", "federated.update_share=0.2")
SHAPES = {name: array.shape for name, array in adapter().items()}
NUMBER = sum(array.size for array in adapter().values())


def drawn(seed):
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


class Packing(SignedSilo):
    """Sends what its plan asks for."""

    versions = (PROTOCOL_VERSION, ROUNDED_VERSION, COMPRESSED_VERSION)

    def answer(self, request, reply):
        if request.version not in self.versions:
            reply.refusal.rule, reply.refusal.message = "version", f"version: asked {request.version}, allowed 3 or 4"
            return
        super().answer(request, reply)
        if request.WhichOneof("kind") == "train":
            assert not request.train.update_dtype
            reply.trained.update = self.content(packed(drawn(request.train.round), self.plan.compression))

    def content(self, honest):
        return honest


class Lying(Packing):
    """Sends other arrays in their place."""

    def __init__(self, name, **parts):
        super().__init__(name)
        self.parts = parts

    def content(self, honest):
        return save({**load(honest), **self.parts})


class Earlier(Packing):
    versions = (PROTOCOL_VERSION, ROUNDED_VERSION)


class Whole(Packing):
    """Sends float32, which would be sound in another run."""

    def content(self, honest):
        return to_bytes(drawn(1))


def told(run, kind):
    return [event for line in run.log.path.read_text().splitlines() if (event := json.loads(line))["event"] == kind]


@pytest.mark.parametrize("few", [FEW, (*FEW[:2],), ("federated.update_share=0.5",)])
def test_a_rounds_mean_is_that_of_what_has_travelled(tmp_path, few):
    run = coordinator(InProcess([Packing("north"), Packing("south")]), tmp_path, *few, SILOS)
    run.run(adapter)
    rounds = [from_bytes(one.adapter) for one in commits.all_rounds(run.directory)]
    for number in (1, 2):
        content = packed(drawn(number), run.plan.compression)
        moved = flat(rounds[number]).astype(np.float64) - flat(rounds[number - 1])
        assert np.abs(moved - flat(unpacked(content, run.plan.compression, SHAPES))).max() < 1e-6
    assert [event["answered"] for event in told(run, "round")] == [["north", "south"]] * 2


@pytest.mark.parametrize(
    ("hostile", "said"),
    [
        (Lying("north", scales=np.array([np.nan], np.float32)), "a scale of the update is negative or not finite"),
        (Lying("north", scales=np.array([3e38], np.float32)), "not finite or not below 32768"),
        (Lying("north", values=np.zeros(4, np.uint8)), "none of the 15"),
        (Lying("north", values=np.zeros(2**20, np.uint8)), "expected are 4 values, 1 scales, 4 positions"),
        (Lying("north", positions=written(np.array([0, 1, 2, 3, 4, 5, 5]), NUMBER)), "position 5 is repeated"),
        (Lying("north", positions=written(np.array([0, 1, 2, 3, 4, 5, 6]), 2**20)), "is not the plan's int4"),
        (Lying("north", positions=np.full(4, 255, np.uint8)), "positions are not 7"),
        (Lying("north", more=np.zeros(1, np.uint8)), "is not the plan's int4"),
        (Whole("north"), "is not the plan's int4"),
    ],
)
def test_a_hostile_update_is_rejected_by_name_alone(tmp_path, hostile, said):
    run = coordinator(InProcess([hostile, Packing("south")]), tmp_path, *FEW, SILOS)
    run.run(adapter)
    assert [event["answered"] for event in told(run, "round")] == [["south"]] * 2
    messages = [event["message"] for event in told(run, "rejected")]
    assert len(messages) == 2
    assert all(message.startswith("silo north: ") and said in message for message in messages)


def test_a_silo_of_the_version_before_is_named_with_the_setting(tmp_path):
    run = coordinator(InProcess([Earlier("north")]), tmp_path / "a", *FEW, SILOS)
    with pytest.raises(PolicyRefusal, match=r"asked 7, allowed 3 or 4; federated\.update_block or update_share is set"):
        run.run(adapter)
    plain = coordinator(InProcess([SignedSilo("north")]), tmp_path / "b", SILOS)
    plain.run(adapter)
    assert "compression" not in plain.plan.model_dump()
