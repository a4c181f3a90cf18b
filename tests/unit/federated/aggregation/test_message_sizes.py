"""What is said to travel, beside what does."""

import numpy as np
import pytest
from silo_requests import signer_of

from configs.errors import InputError
from configs.load import load
from federated.adapters.arrays import to_bytes
from federated.adapters.packed_updates import packed
from federated.adapters.update_codec import encoded
from federated.aggregation.aggregation import RoundAggregation
from federated.aggregation.message_sizes import (
    BESIDE_BYTES,
    MessageSizes,
    message_sizes,
    require_room,
    safetensors_bytes,
)
from federated.coordinator.schedule.training_request import TrainingRequests
from federated.protocol import silo_pb2 as pb
from federated.protocol.envelope import seal_reply, seal_request
from federated.protocol.framing import LARGEST_MESSAGE_BYTES
from privacy.plan_from_settings import plan_terms

SHAPES = {
    "layer.0.lora_A.weight": (2, 16),
    "layer.0.lora_B.weight": (24, 2),
    "layer.1.lora_A.weight": (2, 16),
    "layer.1.lora_B.weight": (24, 2),
}
SIGNER = signer_of(bytes(32))


def arrays(shapes):
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("shapes", [{}, {"ö": (3,)}, {"a": (1,), "b": (0, 4), 'c"\\': (1, 2, 3)}, SHAPES])
def test_arrays_have_as_many_bytes_as_safetensors_writes(shapes):
    assert safetensors_bytes(shapes) == len(to_bytes(arrays(shapes)))


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ['federated.adapters="ffa"'],
        ['federated.adapters="product"'],
        ['federated.aggregation="scaffold"', 'federated.optimizer="sgd"'],
        ["federated.anchor=0.5"],
        ['federated.update_dtype="bfloat16"'],
        ['federated.update_dtype="int8"'],
        ['federated.update_dtype="int8"', "federated.update_block=16"],
        ['federated.update_dtype="int4"', "federated.update_block=16", "federated.update_share=0.2"],
        ["federated.update_share=0.9"],
    ],
)
def test_a_rounds_messages_weigh_what_is_said(changes):
    """As the coordinator builds a request, and a silo its reply; at most a frame below the bound."""
    config = load("tiny", [f"federated.lora_rank={2}", *changes])
    settings = config.federated
    sizes = message_sizes(settings, SHAPES)
    sent = RoundAggregation(settings, arrays(SHAPES), {}, 2).sent("north")
    requests = TrainingRequests(config, plan_terms(config), "a" * 64)
    asked = requests.kind(1, sent, requests.frozen_part(sent.adapter), to_bytes(sent.adapter))
    request = len(seal_request(SIGNER, pb.Request(**asked).SerializeToString(), b"r" * 2000))
    how = requests.plan.compression
    update = packed(sent.adapter, how) if how else encoded(sent.adapter, settings.update_dtype)
    trained = pb.Trained(update=update, receipt=b"r" * 2000)
    reply = len(seal_reply(SIGNER, pb.Reply(trained=trained).SerializeToString()))
    assert sizes.request - BESIDE_BYTES < request <= sizes.request
    assert sizes.reply - BESIDE_BYTES < reply <= sizes.reply


@pytest.mark.parametrize(("dtype", "each"), [("float32", 4), ("bfloat16", 2), ("int8", 1)])
def test_a_reply_weighs_what_its_type_takes(dtype, each):
    settings = load("tiny", [f"federated.update_dtype={dtype}"]).federated
    large = {name: (1000, *shape) for name, shape in SHAPES.items()}
    values = sum(np.prod(shape) for shape in large.values())
    said = message_sizes(settings, large).reply
    assert said >= len(encoded(arrays(large), dtype)) > said - 2 * BESIDE_BYTES
    assert 0 < said - each * values < 2 * BESIDE_BYTES


@pytest.mark.parametrize(("dtype", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("share", [1, 0.1, 0.003])
def test_a_packed_reply_weighs_what_its_values_scales_and_positions_take(dtype, bits, share):
    few = (f"federated.update_dtype={dtype}", "federated.update_block=64", f"federated.update_share={share}")
    config = load("tiny", list(few))
    large = {name: (2000, *shape) for name, shape in SHAPES.items()}
    values = sum(np.prod(shape) for shape in large.values())
    said = message_sizes(config.federated, large).reply - BESIDE_BYTES
    content = packed(arrays(large), plan_terms(config).compression)
    assert 0 <= said - len(content) < 320
    of_position = 0 if share == 1 else 2 + np.log2(1 / share)
    assert 8 * said <= share * values * (bits + 32 / 64 + of_position) + 8 * 400


def test_what_is_frozen_in_a_stage_travels_there_alone():
    stages = 'federated.stages=[{rounds=1, frozen="embeddings"}, {rounds=2}]'
    plain = load("tiny", ["federated.rounds=3"]).federated
    staged = load("tiny", ["federated.rounds=3", stages]).federated
    more = message_sizes(staged, SHAPES).request - message_sizes(plain, SHAPES).request
    assert more == safetensors_bytes({})


def test_what_a_line_does_not_carry_is_said_with_the_fix():
    large = LARGEST_MESSAGE_BYTES + 1
    require_room(MessageSizes(LARGEST_MESSAGE_BYTES, LARGEST_MESSAGE_BYTES), LARGEST_MESSAGE_BYTES)
    with pytest.raises(
        InputError, match=r"a round's request has 900.0 MiB, .* at most 900.0 MiB in one message; lower"
    ):
        require_room(MessageSizes(large, 1), LARGEST_MESSAGE_BYTES)
    with pytest.raises(InputError, match="a round's reply has"):
        require_room(MessageSizes(1, large), LARGEST_MESSAGE_BYTES)


def test_the_line_carries_what_flowers_database_keeps():
    import sqlite3

    connection = sqlite3.connect(":memory:")
    assert connection.getlimit(sqlite3.SQLITE_LIMIT_LENGTH) > LARGEST_MESSAGE_BYTES + 2**20
