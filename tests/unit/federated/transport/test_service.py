"""Callers who take their time: nobody holds the silo's service up, and its health says what is so."""

import contextlib
import threading
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from configs.errors import InputError
from federated.protocol import silo_pb2 as pb
from federated.protocol import silo_pb2_grpc
from federated.protocol.framing import CHUNK_BYTES, SERVICE
from federated.silo.traffic_log import UnloggedError
from federated.transport import service as silo_service
from federated.transport.health import is_serving
from federated.transport.service import MAX_TRANSFERS, MAX_WAITING, serve
from federated.transport.service_client import ask_service


class Answering:
    """What the service hands envelopes to: here one that answers with a reply of a chosen size, when it is let."""

    def __init__(self):
        self.size, self.handled, self.raised = 0, [], None
        self.free = threading.Event()
        self.free.set()

    def handle(self, content):
        self.free.wait(300)
        self.handled.append(len(content))
        if self.raised:
            raise self.raised
        reply = pb.Reply(trained=pb.Trained(update=bytes(self.size)))
        return pb.Envelope(body=reply.SerializeToString()).SerializeToString()


@pytest.fixture
def silo():
    return Answering()


class Counting(silo_service._Transfers):
    """Counts the messages that have begun to come, and has them counted by tests."""

    came = 0

    @contextlib.contextmanager
    def one(self, context):
        with super().one(context):
            Counting.came += 1
            yield

    def holds(self, context, size_bytes):
        super().holds(context, size_bytes)
        Counting.held_bytes = sum(self._held.values())


@pytest.fixture
def transfers(monkeypatch):
    """What the service of a test has let in."""
    monkeypatch.setattr(silo_service, "_Transfers", Counting)
    Counting.came = Counting.held_bytes = 0
    return Counting


@pytest.fixture
def address(silo, transfers, tmp_path_factory):
    address = f"unix:{tmp_path_factory.mktemp('s')}/silo.sock"
    server, _ = serve(silo.handle, 4 * CHUNK_BYTES, address)
    yield address
    server.stop(grace=None).wait()


@pytest.fixture
def slow(address):
    """Starts callers that begin a request and never end it; each is (its call, the thread that waits for its end)."""
    over = threading.Event()
    channels = []

    def start(number, first=b"x"):
        def parts():
            yield pb.Chunk(data=first)
            over.wait(300)

        calls = []
        for _ in range(number):
            channels.append(grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]))
            calls.append(silo_pb2_grpc.SiloStub(channels[-1]).Exchange(parts()))
        return calls

    yield start
    over.set()
    for channel in channels:
        channel.close()


def eventually(true, seconds=300):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [MAX_WAITING + 1, 60])
def test_callers_that_send_one_byte_hold_nothing_up(silo, address, slow, transfers, number):
    """Before: five of them, and everybody else was sent away for ever while the health service said SERVING."""
    calls = slow(number)
    eventually(lambda: transfers.came == number)
    for _ in range(3):
        assert is_serving(address, SERVICE)
        assert ask_service(address, b"honest", timeout_s=60)
    assert silo.handled == [6] * 3
    eventually(lambda: sum(call.is_active() for call in calls) == min(number, MAX_TRANSFERS - 1))


def test_a_request_that_never_comes_whole_ends_in_time_and_is_never_looked_at(silo, address, slow, monkeypatch):
    monkeypatch.setattr(silo_service, "TRANSFER_S", 0.5)
    (call,) = slow(1)
    with pytest.raises(grpc.RpcError):
        next(call)
    assert call.code() == grpc.StatusCode.CANCELLED
    assert silo.handled == []


def test_of_many_the_one_that_has_taken_longest_makes_room(address, slow, transfers):
    calls = slow(1)
    eventually(lambda: transfers.came == 1)
    calls += slow(MAX_TRANSFERS)
    eventually(lambda: not calls[0].is_active())
    assert calls[0].code() == grpc.StatusCode.CANCELLED
    assert sum(call.is_active() for call in calls) == MAX_TRANSFERS


def test_half_requests_share_a_bounded_memory(address, slow, transfers):
    """Twice the largest request, whoever holds it: before, each of eight could hold one of 256 MiB for ever."""
    largest = 4 * CHUNK_BYTES

    def parts(over):
        for _ in range(largest // CHUNK_BYTES):
            yield pb.Chunk(data=bytes(CHUNK_BYTES))
        over.wait(300)

    over, calls = threading.Event(), []
    with grpc.insecure_channel(address) as channel:
        for number in (1, 2, 2):
            before = transfers.came
            calls.append(silo_pb2_grpc.SiloStub(channel).Exchange(parts(over)))
            eventually(lambda before=before: transfers.came == before + 1)
            eventually(lambda number=number: transfers.held_bytes == number * largest)
        eventually(lambda: sum(call.is_active() for call in calls) == 2)
        assert not calls[0].is_active()
        assert ask_service(address, b"honest", timeout_s=60)
        over.set()


def test_callers_that_fetch_no_reply_hold_nothing_up(silo, address):
    """Before: each held a thread for ever; twelve, and neither a request nor the health service was answered at all."""
    silo.size = 8 * CHUNK_BYTES
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]  # and little is fetched ahead
    channels = [grpc.insecure_channel(address, options=options) for _ in range(12)]
    calls = []
    for number, channel in enumerate(channels, 1):
        calls.append(silo_pb2_grpc.SiloStub(channel).Exchange(iter([pb.Chunk(data=b"x")])))
        eventually(lambda number=number: len(silo.handled) == number)
    silo.size = 0
    assert is_serving(address, SERVICE)
    assert ask_service(address, b"honest", timeout_s=60)
    with pytest.raises(grpc.RpcError):  # the oldest made room, and can't be fetched any more
        list(calls[0])
    assert calls[0].code() == grpc.StatusCode.CANCELLED
    assert sum(len(part.data) for part in calls[-1]) > silo.size  # the newest can
    for channel in channels:
        channel.close()


def test_questions_about_health_that_never_come_hold_nothing_up(address):
    """gRPC waits for ever, and with a thread, for the one message of a call that has one."""
    over, channels = threading.Event(), []

    def never():
        over.wait(300)
        yield from ()

    for _ in range(60):
        channels.append(grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]))
        channels[-1].stream_stream("/grpc.health.v1.Health/Check")(never())
    time.sleep(0.3)
    assert is_serving(address, SERVICE)
    assert ask_service(address, b"honest", timeout_s=60)
    over.set()
    for channel in channels:
        channel.close()


def test_a_request_that_is_being_answered_is_no_reason_to_send_others_away(silo, address):
    silo.free.clear()
    thread = threading.Thread(target=ask_service, args=(address, b"x"))
    thread.start()
    time.sleep(0.3)
    assert is_serving(address, SERVICE)
    silo.free.set()
    thread.join()


def test_health_tells_that_the_queue_is_full_and_again_when_it_is_not(silo, address):
    silo.free.clear()
    threads = [threading.Thread(target=ask_service, args=(address, b"x")) for _ in range(MAX_WAITING + 1)]
    for thread in threads:
        thread.start()
    eventually(lambda: not is_serving(address, SERVICE))
    with pytest.raises(grpc.RpcError) as error:
        ask_service(address, b"one more", timeout_s=60)
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    silo.free.set()
    for thread in threads:
        thread.join()
    assert is_serving(address, SERVICE)


def test_without_an_audit_log_the_caller_gets_a_code_and_health_says_so(silo, address):
    for raised in (UnloggedError("/srv/silo/state: no space"), ZeroDivisionError("patient 7")):
        silo.raised = raised
        with pytest.raises(grpc.RpcError) as error:
            ask_service(address, b"x", timeout_s=60)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        assert error.value.details() == "no reply can leave now; ask again later"
        assert not is_serving(address, SERVICE)
    silo.raised = None
    assert ask_service(address, b"x", timeout_s=60)
    assert is_serving(address, SERVICE)


def test_health_is_asked_by_check_for_the_server_and_the_service(address):
    assert is_serving(address)
    assert not is_serving(address, "another.Service")
    with grpc.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
        with pytest.raises(grpc.RpcError) as error:
            next(watch)
    assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_sockets_path_is_measured_in_bytes():
    """Before: in signs, so that gRPC failed on it in words of its own."""
    with pytest.raises(InputError, match="longer than 100 bytes; give a shorter path"):
        silo_service._clear(Path("/nowhere") / ("ü" * 60))
