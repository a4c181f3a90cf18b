"""Every text that crosses the boundary has a bound; one that is longer is refused before it is written anywhere."""

import json

import pytest
from google.protobuf.descriptor import FieldDescriptor
from silo_requests import COORDINATOR, body_of

from configs.errors import InputError, PolicyRefusal
from configs.parse import parse
from federated.coordinator.replies import Asked, opened
from federated.identity.cards import CoordinatorCard, EnrolledSilo, RelayCard, TrustedCoordinator
from federated.protocol import silo_pb2 as pb
from federated.protocol.bounds import LARGEST, excess, has_length
from federated.protocol.envelope import seal_request
from federated.silo.requests import decode, open_envelope, refusal_message
from privacy.ledger.statements import AuditStatement, Receipt, RunStatement
from privacy.plan import PlanTerms

MESSAGES = pb.DESCRIPTOR.message_types_by_name.values()
FIELDS = {
    f"{message.name}.{field.name}": field for message in MESSAGES for field in message.fields if has_length(field)
}
SHORT = sorted(name for name in FIELDS if LARGEST[name] < 2**31 - 1)


def test_every_text_content_and_list_of_every_message_has_a_bound():
    """Fails for a new field until it has one, and for a bound whose field is gone."""
    assert set(FIELDS) == set(LARGEST)


@pytest.mark.parametrize("name", SHORT)
def test_a_value_may_be_as_long_as_its_bound_and_no_longer(name):
    field, most = FIELDS[name], LARGEST[name]
    one = {FieldDescriptor.TYPE_STRING: "é", FieldDescriptor.TYPE_BYTES: b"x", FieldDescriptor.TYPE_DOUBLE: [0.0]}
    one[FieldDescriptor.TYPE_MESSAGE] = [pb.Member()]
    message = getattr(pb, field.containing_type.name)
    assert excess(message(**{field.name: one[field.type] * most})) is None
    found = excess(message(**{field.name: one[field.type] * (most + 1)}))
    assert found is not None
    assert found[0] == field.name
    assert found[1].startswith(f"{most + 1} ")


def test_messages_inside_messages_are_looked_at():
    spec = pb.AdapterSpec(frozen_digest="a" * 65)
    request = pb.Request(contribute=pb.Contribute(train=pb.Train(adapter_spec=spec)))
    assert excess(request) == ("frozen_digest", "65 characters", "at most 64")


def test_a_long_text_is_refused_whatever_the_request_asks_for():
    """Before: a describe's run id of 14 MiB was taken, and written to the audit log as 57 MiB."""
    long = "\U0001f600" * 1000
    for changes in ({"run_id": long}, {"request_id": long}, {"coordinator": long}, {"silo_id": long}):
        with pytest.raises(PolicyRefusal) as refused:
            decode(body_of(**{"request_id": "x", "describe": pb.Describe(), **changes}), "north")
        assert refused.value.rule == next(iter(changes))
        assert len(str(refused.value)) < 100
    envelope = seal_request(COORDINATOR, body_of("x", describe=pb.Describe()), b"x" * (2**20 + 1))
    with pytest.raises(PolicyRefusal, match="receipt: asked 1048577 bytes"):
        open_envelope(envelope, 2**28)


def test_what_a_silo_says_in_a_refusal_is_within_the_bounds():
    for text in ("a", "\x1b", "\U000e0001", "é"):
        assert excess(refusal_message(PolicyRefusal.of("rule", text * 10**6, text * 10**6))) is None


def test_a_reply_that_says_too_much_is_rejected_before_it_is_in_the_events():
    """Before: a silo's refusal of any length was copied into the coordinator's events, status and terminal."""
    asked = Asked.of(b"a request")
    for length in (3000, 3001):
        reply = pb.Reply(request_digest=asked.digest, refusal=pb.Refusal(rule="x", message="m" * length))
        envelope = pb.Envelope(body=reply.SerializeToString()).SerializeToString()
        if length == 3000:
            assert opened(envelope, asked)[1] == reply
        else:
            with pytest.raises(ValueError, match="the reply's message has 3001 characters, allowed at most 3000"):
                opened(envelope, asked)


@pytest.mark.parametrize(
    "schema",
    [PlanTerms, Receipt, RunStatement, AuditStatement, TrustedCoordinator, EnrolledSilo, CoordinatorCard, RelayCard],
)
def test_every_text_and_list_of_every_document_has_a_bound(schema):
    """Plans, receipts, statements and cards are JSON inside messages, or files that came by mail."""

    def unbounded(tree, where):
        if isinstance(tree, list):
            return [found for item in tree for found in unbounded(item, where)]
        if not isinstance(tree, dict):
            return []
        needed = {"string": "maxLength", "array": "maxItems", "object": "maxProperties"}.get(tree.get("type"))
        free = needed and not {needed, "enum", "const"} & set(tree) and "properties" not in tree
        here = [where] if free else []
        return here + [found for key, item in tree.items() for found in unbounded(item, f"{where}.{key}")]

    assert unbounded(schema.model_json_schema(), schema.__name__) == []


def test_what_is_wrong_with_a_document_is_said_in_few_words():
    spends = [{"entry": "e" * 10**5, "epsilon": -1, "delta": 0} for _ in range(1000)]
    with pytest.raises(InputError) as error:
        parse(Receipt, {"spends": spends, "x" * 10**6: 1}, "receipt")
    assert len(str(error.value)) < 10_000
    assert str(error.value).endswith(" more")
    with pytest.raises(InputError) as error:
        Receipt.from_bytes(json.dumps({"x" * 10**5: 1}).encode()[:-1] + b', "y": 1, "y": 2}', "receipt")
    assert str(error.value) == "receipt: 'y' is there twice; give the file as it was written"


def test_what_is_inside_of_a_list_is_bounded_too():
    secure = pb.Secure(roster=[pb.Member(silo="a"), pb.Member(silo="b" * 101)])
    train = pb.Request(train=pb.Train(secure=secure))
    assert excess(train) == ("silo", "101 characters", "at most 100")
