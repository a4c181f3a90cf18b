"""What crosses between coordinator and relay inside Flower's messages."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from federated.protocol import silo_pb2 as pb
from federated.protocol import silo_pb2_grpc
from federated.transport.client_app import make_app, reach_service, seconds_left
from federated.transport.flower_messages import SHARED, pack, size_bytes, unpack
from federated.transport.service_client import UnansweredError, ask


@given(st.binary(), st.binary(), st.binary())
def test_an_envelope_arrives_as_it_was_whatever_is_shared(head, shared, tail):
    assert unpack(pack(head + shared + tail, shared)) == head + shared + tail
    assert unpack(pack(head, shared)) == head  # what is said to be shared is not in it
    assert unpack(pack(head)) == head


def test_what_is_shared_is_one_record_with_one_name_for_flower():
    one, other = (pack(silo + bytes(1000) + b"end", bytes(1000)) for silo in (b"one", b"other"))
    assert one[SHARED].object_id == other[SHARED].object_id
    assert one["siloweave"].object_id != other["siloweave"].object_id
    assert (one["siloweave"]["head"], one["siloweave"]["tail"]) == (b"one", b"end")


def test_what_is_shared_is_found_behind_what_begins_like_it():
    shared = bytes(100) + b"adapter"
    content = pack(b"head" + bytes(100) + b"correction" + shared + b"tail", shared)
    assert content[SHARED]["content"] == shared
    assert size_bytes(content) == len(unpack(content)) == 4 + 100 + 10 + 107 + 4


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"siloweave": ConfigRecord({"head": b"a", "tail": b"b"})}),
        RecordDict({"siloweave": ConfigRecord({"head": "a", "tail": b""}), SHARED: ConfigRecord({"content": b""})}),
    ],
)
def test_what_was_not_packed_is_refused(content):
    with pytest.raises(ValueError, match="no siloweave envelope"):
        unpack(content)


class Breaks(silo_pb2_grpc.SiloServicer):
    """A service that ends its first call with a code, after a part of its reply or none, and answers all later ones."""

    def __init__(self, code, details, part):
        self.code, self.details, self.part, self.calls = code, details, part, 0

    def Exchange(self, request_iterator, context):
        content = b"".join(part.data for part in request_iterator)
        self.calls += 1
        if self.calls == 1:
            if self.part:
                yield pb.Chunk(data=self.part)
            context.abort(self.code, self.details)
        yield pb.Chunk(data=b"answer to " + content)


@pytest.fixture
def breaking(tmp_path_factory):
    """Starts such services."""
    servers = []

    def start(*arguments):
        server, servicer = grpc.server(ThreadPoolExecutor(2)), Breaks(*arguments)
        silo_pb2_grpc.add_SiloServicer_to_server(servicer, server)
        address = f"unix:{tmp_path_factory.mktemp('s')}/silo.sock"
        server.add_insecure_port(address)
        server.start()
        servers.append(server)
        return servicer, address

    yield start
    for server in servers:
        server.stop(None).wait()


CODE = grpc.StatusCode


@pytest.mark.parametrize(
    ("code", "details", "part"),
    [
        (CODE.UNAVAILABLE, "Socket closed", b""),
        (CODE.UNAVAILABLE, "Socket closed", b"half of an "),
        (CODE.CANCELLED, "the server is stopped", b""),
        (CODE.RESOURCE_EXHAUSTED, "queue: 4 requests wait; ask again later", b""),
        (CODE.DEADLINE_EXCEEDED, "transfer: allowed 120 s", b"half of an "),
    ],
)
def test_what_may_be_answered_later_is_asked_again_with_one_line_in_the_log(breaking, caplog, code, details, part):
    servicer, address = breaking(code, details, part)
    with caplog.at_level(logging.WARNING, "siloweave.relay"):
        assert ask(address, b"it", timeout_s=300) == b"answer to it"
    assert servicer.calls == 2
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"silo service {address}: {code.name}: {details}; asked again in 0.5 s, until ")


@pytest.mark.parametrize(
    ("code", "details"),
    [
        (CODE.RESOURCE_EXHAUSTED, "max_request_bytes: allowed 4194304"),
        (CODE.INVALID_ARGUMENT, "line one\nline two" + "x" * 1000),
        (CODE.INVALID_ARGUMENT, "\x1b[2Jcleared\x1b]0;owned\x07"),
        (CODE.UNIMPLEMENTED, ""),
        (CODE.UNKNOWN, "Exception calling application"),
    ],
)
def test_what_no_repetition_mends_is_one_line_at_once(breaking, code, details):
    servicer, address = breaking(code, details, b"")
    with pytest.raises(UnansweredError) as error:
        ask(address, b"it", timeout_s=300)
    assert servicer.calls == 1
    assert str(error.value).startswith(f"its service at {address} gave no answer ({code.name}: ")
    assert str(error.value).isprintable() and len(str(error.value)) < 400


@pytest.mark.parametrize("code", [CODE.PERMISSION_DENIED, CODE.RESOURCE_EXHAUSTED])
def test_a_signed_refusal_is_never_asked_for_twice(breaking, code):
    servicer, address = breaking(code, "", b"a refusal")
    assert ask(address, b"it", timeout_s=300) == b"a refusal"
    assert servicer.calls == 1


def relayed(content, ttl_s=30.0, **node):
    """What the very app that a SuperNode starts says of a message: Flower would log an exception with its traceback."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    message = Message(content, 1, "train", ttl=ttl_s)
    reply = make_app(reach_service)(message, Context(1, 1, node, RecordDict(), {}))
    assert reply.error.reason.isprintable()
    return reply.error.reason


def test_where_no_service_is_that_is_said_at_once_and_at_the_messages_end(tmp_path, caplog):
    """Before: gRPC itself waited for the service, and the relay's log had nothing until the message was over."""
    address = f"unix:{tmp_path}/none"
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, "siloweave.relay"):
        reason = relayed(pack(b"it"), 2.0, **{"silo-address": address})
    assert time.monotonic() - began < 300
    assert reason.startswith(f"its service at {address} gave no answer (UNAVAILABLE: ")
    first, *_ = [record.getMessage() for record in caplog.records]
    assert first.startswith(f"silo service {address}: UNAVAILABLE: ")
    assert "asked again in 0.5 s, until 2 s from now" in first


def test_a_service_that_comes_up_late_answers(tmp_path, caplog):
    server, address = grpc.server(ThreadPoolExecutor(2)), f"unix:{tmp_path}/late.sock"
    silo_pb2_grpc.add_SiloServicer_to_server(Breaks(CODE.UNAVAILABLE, "not yet", b""), server)
    with ThreadPoolExecutor(1) as relay, caplog.at_level(logging.WARNING, "siloweave.relay"):
        answer = relay.submit(ask, address, b"it", timeout_s=300)
        deadline = time.monotonic() + 300
        while not caplog.records:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        server.add_insecure_port(address)
        server.start()
        assert answer.result(300) == b"answer to it"
    server.stop(None).wait()


@pytest.mark.parametrize("name", ["relay.key", "relay.crt", "service-ca.crt"])
def test_a_missing_file_for_tls_is_one_line(tmp_path, name):
    for one in {"relay.key", "relay.crt", "service-ca.crt"} - {name}:
        (tmp_path / one).write_bytes(b"")
    reason = relayed(pack(b"it"), **{"silo-address": "localhost:1", "silo-tls": str(tmp_path)})
    assert f"{tmp_path / name}: can't be read (No such file or directory)" in reason


def test_a_message_without_an_envelope_is_one_line():
    assert relayed(RecordDict(), **{"silo-address": "unix:/none"}) == "the message holds no siloweave envelope"


def test_the_time_that_is_left_is_the_messages_whatever_the_clocks_say(monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    message = Message(pack(b"it"), 1, "train", ttl=600.0)
    for age_s, left_s in ((0, 598), (100, 498), (597, 1), (599.5, 0), (700, 598), (-50, 598)):
        message.metadata.created_at = now - age_s
        assert seconds_left(message) == pytest.approx(left_s, abs=0.001)
