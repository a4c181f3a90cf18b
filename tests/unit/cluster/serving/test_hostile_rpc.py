"""Clients of the gRPC service that mean harm: they send nothing, too much or something to inflate, or take nothing."""

import asyncio
import struct
from contextlib import asynccontextmanager, suppress

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ports import free_port
from served_models import CONTEXT, a_model

from cluster.serving import guard
from cluster.serving.app import LARGEST_BODY, Service
from cluster.serving.keys import ApiKeys
from cluster.serving.models import find, load
from cluster.serving.rpc import service as rpc
from cluster.serving.rpc import serving_pb2 as pb
from cluster.serving.rpc import serving_pb2_grpc
from trainer.inference.batching import Engine, EngineLimits

CALL, CHECK = "/siloweave.serving.v1.Serving/Complete", "/grpc.health.v1.Health/Check"
STREAM = "/siloweave.serving.v1.Serving/StreamComplete"
SHORT = pb.CompletionRequest(model="ship", prompt="the old ship", sampling=pb.Sampling(max_tokens=8, temperature=0))
KEY = "key-of-the-clinic-0001"
SIGNED = (("authorization", f"Bearer {KEY}"),)
DATA, HEADERS, SETTINGS, PING, GOAWAY = 0, 1, 4, 6, 7  # HTTP/2's kinds of frames
END_STREAM, END_HEADERS, ACK = 1, 4, 1
NO_WINDOW = struct.pack("!HI", 4, 0)  # the setting INITIAL_WINDOW_SIZE


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return load([find(str(a_model(tmp_path_factory.mktemp("models") / "ship")), None)], None)


@pytest.fixture
def service_of(served, tmp_path):
    engines = []

    def make(keys=True, timeout_s=300.0):
        engines.append(Engine({"ship": served["ship"].voice}, EngineLimits(2, 2 * CONTEXT, 2)))
        return Service(served, engines[-1], ApiKeys(file) if keys else None, timeout_s, 4)

    file = tmp_path / "keys"
    file.write_text(KEY)
    file.chmod(0o600)
    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(autouse=True)
def nothing_is_logged(caplog):
    yield
    assert not [record.getMessage() for record in caplog.get_records("call") if record.name.startswith("grpc")]


class Raw:
    """A connection by hand: gRPC's own client neither stops after the headers nor gives a window of nothing."""

    def __init__(self, reader, writer, settings):
        self._reader, self._writer, self._streams = reader, writer, 0
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self._frame(SETTINGS, 0, 0, settings)

    def _frame(self, kind, flags, stream, content):
        self._writer.write(struct.pack("!I", len(content))[1:] + struct.pack("!BBI", kind, flags, stream) + content)

    def call(self, path, metadata=(), message=None):
        """Opens a call; with a message it is a whole one."""
        stream, self._streams = 2 * self._streams + 1, self._streams + 1
        names = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "here", "te": "trailers"}
        fields = {**names, "content-type": "application/grpc", **dict(metadata)}
        literals = [
            bytes((0, len(name))) + name.encode() + bytes((len(it),)) + it.encode() for name, it in fields.items()
        ]
        self._frame(HEADERS, END_HEADERS, stream, b"".join(literals))
        if message is not None:
            content = message.SerializeToString()
            self._frame(DATA, END_STREAM, stream, struct.pack("!BI", 0, len(content)) + content)

    def close(self):
        """Goes away."""
        self._writer.close()

    async def ends(self):
        """Answers pings until the service closes the connection."""
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await self._reader.readexactly(9)
                content = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                if head[3] == PING and not head[4] & ACK:
                    self._frame(PING, ACK, 0, content)


def attacked(service, attack, settings=b""):
    """What an attack gives, which gets the address, and stubs of an honest client."""

    @asynccontextmanager
    async def raw(address):
        reader, writer = await asyncio.open_connection(*address.split(":"))
        try:
            yield Raw(reader, writer, settings)
        finally:
            writer.close()

    async def run():
        address = f"127.0.0.1:{free_port()}"
        async with (
            rpc.serving(service, address),
            grpc.aio.insecure_channel(address) as channel,
            raw(address) as connection,
        ):
            stubs = serving_pb2_grpc.ServingStub(channel), health_pb2_grpc.HealthStub(channel)
            return await asyncio.wait_for(attack(connection, *stubs), 120)

    return asyncio.run(run())


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


async def at_last(health):
    """Its answer, where there is room for the question again."""
    while True:
        with suppress(grpc.aio.AioRpcError):
            return (await health.Check(health_pb2.HealthCheckRequest())).status


async def refused(calling):
    try:
        await calling
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details()
    raise AssertionError("it was answered")


@pytest.mark.parametrize("path", [CALL, STREAM])
def test_calls_without_a_key_are_refused_before_their_message_comes(path, service_of):
    service = service_of()
    ended = []
    service.guard.count = lambda path, status: ended.append(status)

    async def attack(connection, stub, health):
        for _ in range(service.guard.most + rpc._QUESTIONS):
            connection.call(path)
        await until(lambda: len(ended) == service.guard.most + rpc._QUESTIONS)
        assert set(ended) == {"UNAUTHENTICATED"}
        assert not service.guard.active
        return (await health.Check(health_pb2.HealthCheckRequest())).status, await stub.Complete(SHORT, metadata=SIGNED)

    status, answer = attacked(service, attack)
    assert status == health_pb2.HealthCheckResponse.SERVING
    assert answer.completion_tokens


def test_calls_whose_message_never_comes_leave_health_alone(service_of, monkeypatch):
    monkeypatch.setattr(guard, "ARRIVAL_S", 600.0)
    service = service_of(keys=False)

    async def attack(connection, stub, health):
        for _ in range(service.guard.most):
            connection.call(CALL)
        await until(lambda: service.guard.active == service.guard.most)
        return (await health.Check(health_pb2.HealthCheckRequest())).status, await refused(stub.Complete(SHORT))

    status, (code, said) = attacked(service, attack)
    assert status == health_pb2.HealthCheckResponse.SERVING
    assert (code, said) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests at one time; try again later")


def test_a_message_that_does_not_come_in_time_ends_its_call(service_of, monkeypatch):
    monkeypatch.setattr(guard, "ARRIVAL_S", 0.5)
    service = service_of()
    ended = []
    service.guard.count = lambda path, status: ended.append((path, status))

    async def attack(connection, stub, health):
        for path in (CALL, STREAM):
            connection.call(path, SIGNED)
        for _ in range(rpc._QUESTIONS):
            connection.call(CHECK)
        await until(lambda: len(ended) == 2)
        late = "DEADLINE_EXCEEDED"
        assert sorted(ended) == [("grpc Complete", late), ("grpc StreamComplete", late)]
        return await at_last(health)  # the questions end in the same time

    assert attacked(service, attack) == health_pb2.HealthCheckResponse.SERVING


def test_questions_about_health_take_no_places_of_requests(service_of, monkeypatch):
    monkeypatch.setattr(guard, "ARRIVAL_S", 600.0)
    service = service_of()

    async def attack(connection, stub, health):
        for _ in range(service.guard.most + rpc._QUESTIONS):
            connection.call(CHECK)
        code, said = await first_refusal(health)
        return code, said, await stub.Complete(SHORT, metadata=SIGNED)

    async def first_refusal(health):
        while True:
            with suppress(AssertionError):
                return await refused(health.Check(health_pb2.HealthCheckRequest()))

    code, said, answer = attacked(service, attack)
    assert (code, said) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests at one time; try again later")
    assert answer.completion_tokens


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize(
    ("path", "kind"), [(CALL, SHORT), (STREAM, SHORT), (CHECK, health_pb2.HealthCheckRequest())], ids=str
)
def test_a_call_brings_one_message(path, kind, number, service_of):
    async def run():
        address = f"127.0.0.1:{free_port()}"
        async with rpc.serving(service_of(keys=False), address), grpc.aio.insecure_channel(address) as channel:
            several = channel.stream_unary(path, request_serializer=lambda message: message.SerializeToString())
            return await refused(several(iter([kind] * number)))

    assert asyncio.run(run()) == (grpc.StatusCode.INVALID_ARGUMENT, "a call brings one message; send one")


def test_who_takes_no_reply_is_ended_with_its_connection(service_of, monkeypatch):
    monkeypatch.setattr(rpc, "_AGE_MS", 1)
    monkeypatch.setattr(rpc, "SLOW_S", 0.0)
    monkeypatch.setattr(rpc, "ARRIVAL_S", 0.5)
    service = service_of(timeout_s=0.5)

    async def attack(connection, stub, health):
        for path in (CALL, STREAM):
            connection.call(path, SIGNED, SHORT)
        for _ in range(rpc._QUESTIONS):
            connection.call(CHECK, message=health_pb2.HealthCheckRequest())
        await connection.ends()
        return await at_last(health)

    assert attacked(service, attack, NO_WINDOW) == health_pb2.HealthCheckResponse.SERVING


def test_who_goes_before_its_message_came_holds_nothing(service_of, monkeypatch):
    monkeypatch.setattr(guard, "ARRIVAL_S", 600.0)
    service = service_of()

    async def attack(connection, stub, health):
        for path in (CALL, STREAM):
            connection.call(path, SIGNED)
        for _ in range(rpc._QUESTIONS):
            connection.call(CHECK)
        await until(lambda: service.guard.active == 2)
        connection.close()
        await until(lambda: not service.guard.active)
        return await at_last(health)

    assert attacked(service, attack) == health_pb2.HealthCheckResponse.SERVING


def test_replies_that_nobody_takes_hold_no_place_of_other_kinds(service_of):
    service = service_of()

    async def attack(connection, stub, health):
        for _ in range(rpc._QUESTIONS + 1):
            connection.call(CHECK, message=health_pb2.HealthCheckRequest())
        while True:
            try:
                await health.Check(health_pb2.HealthCheckRequest())
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                return await stub.Complete(SHORT, metadata=SIGNED)

    assert attacked(service, attack, NO_WINDOW).completion_tokens


@pytest.mark.parametrize("how", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_what_comes_compressed_is_refused_and_never_inflated(how, service_of):
    bomb, service = pb.CompletionRequest(model="ship", prompt="a" * (4 * LARGEST_BODY)), service_of(keys=False)

    async def attack(_connection, stub, _health):
        return await refused(stub.Complete(bomb, compression=how)), await stub.Complete(SHORT)

    (code, said), answer = attacked(service, attack)
    assert code is grpc.StatusCode.INVALID_ARGUMENT  # inflated it would be too large: RESOURCE_EXHAUSTED
    assert said == "the message is none of this call's, is compressed, or has invalid UTF-8"
    assert answer.completion_tokens
