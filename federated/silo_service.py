"""A silo as a warm gRPC service, on a Unix socket or by mutual TLS, with the standard health service.

One thread moves bytes for all callers and is never held up by any, so a slow one costs a little memory and no thread.
"""

import asyncio
import contextlib
import os
import socket as socket_module
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from configs.errors import InputError
from federated import silo_pb2 as pb
from federated import silo_pb2_grpc
from federated.protocol import CHUNK_BYTES, SERVICE, chunks
from federated.silo import Silo

MAX_WAITING = 4  # whole requests that wait while one is answered; more are sent away
MAX_TRANSFERS = 8  # requests and replies on their way at a time; a new one ends the one that has taken longest
TRANSFER_S = 120.0  # a request must have come, and a reply must have been fetched, in this time
_BUDGETS = ("budget_", "max_epsilon_", "max_request", "max_reservations")
_LONGEST_SOCKET_PATH = 100  # the system's limit is 108 bytes with the final zero


@dataclass(frozen=True)
class ServiceTls:
    """Mutual TLS, all PEM: the service's key and certificate, and the authority that signed the relay's."""

    key: bytes
    certificate: bytes
    authority: bytes


class _Transfers:
    """Messages that are on their way: few at a time, in bounded time and memory, whoever is at the other end."""

    def __init__(self, largest_bytes: int) -> None:
        self._most_bytes = 2 * largest_bytes
        self._held: dict[asyncio.Timeout, int] = {}  # bytes by transfer, oldest first

    @contextlib.asynccontextmanager
    async def one(self, context: Any) -> AsyncIterator[asyncio.Timeout]:
        """A transfer's time; the call ends where it is over."""
        while len(self._held) >= MAX_TRANSFERS:
            self._end_oldest()
        try:
            async with asyncio.timeout(TRANSFER_S) as transfer:
                self._held[transfer] = 0
                try:
                    yield transfer
                finally:
                    self._held.pop(transfer, None)
        except TimeoutError:
            allowed = f"{TRANSFER_S:g} s, and less where {MAX_TRANSFERS} others came later"
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"transfer: allowed {allowed}; send it again")

    def holds(self, transfer: asyncio.Timeout, size_bytes: int) -> None:
        """Has a transfer hold so many bytes; older ones end where all together would hold too many."""
        if transfer not in self._held:
            return  # it was told to end
        self._held[transfer] = size_bytes
        while sum(self._held.values()) > self._most_bytes and len(self._held) > 1:
            self._end_oldest(keep=transfer)

    def _end_oldest(self, keep: asyncio.Timeout | None = None) -> None:
        oldest = next(transfer for transfer in self._held if transfer is not keep)
        del self._held[oldest]
        if not oldest.expired():
            oldest.reschedule(0)


class SiloServicer(silo_pb2_grpc.SiloServicer):
    """Hands envelopes to the silo and its answers back, one at a time.

    A caller that gives up changes nothing: what is charged stays charged, and the stored reply waits for it. A place
    among the requests that wait is for those that have come whole.
    """

    def __init__(self, silo: Silo) -> None:
        self._silo = silo
        self._transfers = _Transfers(silo.config.policy.max_request_bytes)
        self._places = threading.BoundedSemaphore(1 + MAX_WAITING)
        self._threads = ThreadPoolExecutor(1 + MAX_WAITING, thread_name_prefix="silo")
        self._answers = True

    def takes_requests(self) -> bool:
        """Whether a request that came now would be answered: a place is free, and the last request was."""
        if not self._places.acquire(blocking=False):
            return False
        self._places.release()
        return self._answers

    async def Exchange(self, _: Any, context: Any) -> None:  # noqa: N802
        """One request and its reply. A refusal is a reply, too, and the call then ends with its status code."""
        async with self._transfers.one(context) as transfer:
            request = await self._received(transfer, context)
        if not self._places.acquire(blocking=False):
            full = f"queue: {MAX_WAITING} requests wait; ask again later"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, full)
        answering = self._threads.submit(self._silo.handle, request)
        answering.add_done_callback(self._answered)  # and not when the caller goes: the silo goes on
        try:
            reply = await asyncio.wrap_future(answering)
        except Exception:  # the audit log can't be written; and gRPC would send another exception's words
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no reply can leave now; ask again later")
        async with self._transfers.one(context):
            for part in chunks(reply):
                await context.write(pb.Chunk(data=part))
        code = _status(reply)
        if code is not None:
            context.set_code(code)

    def _answered(self, answering: "Future[bytes]") -> None:
        self._answers = answering.cancelled() or answering.exception() is None
        self._places.release()

    async def _received(self, transfer: asyncio.Timeout, context: Any) -> bytes:
        """The whole envelope; nobody makes the service hold more than the policy allows."""
        largest, received = self._silo.config.policy.max_request_bytes, bytearray()
        while (part := await context.read()) is not grpc.aio.EOF:
            received += part.data
            if len(received) > largest:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"max_request_bytes: allowed {largest}")
            self._transfers.holds(transfer, len(received))
        if context.cancelled():  # it has gone before anything was charged
            raise asyncio.CancelledError
        return bytes(received)


class _Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # its module has no types
    """The standard health service, for one question at a time: a watcher would hold a call for ever."""

    def __init__(self, servicer: SiloServicer) -> None:
        self._servicer = servicer

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Whether the service takes requests now."""
        if request.service not in ("", SERVICE):
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        statuses = health_pb2.HealthCheckResponse
        return statuses(status=statuses.SERVING if self._servicer.takes_requests() else statuses.NOT_SERVING)

    async def Watch(self, _: Any, context: Any) -> None:  # noqa: N802
        """Is not there."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "ask by Check")


def _status(reply: bytes) -> grpc.StatusCode | None:
    """The status code of a refusal: whether it would never be allowed, or something is used up."""
    answer = pb.Reply.FromString(pb.Envelope.FromString(reply).body)
    if answer.WhichOneof("kind") != "refusal":
        return None
    used_up = answer.refusal.rule.startswith(_BUDGETS)
    return grpc.StatusCode.RESOURCE_EXHAUSTED if used_up else grpc.StatusCode.PERMISSION_DENIED


class Service:
    """A running service.

    Attributes:
        port: where it listens; 1 for a Unix socket.
    """

    def __init__(self, silo: Silo, address: str, tls: ServiceTls | None) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="silo service", daemon=True)
        self._thread.start()
        try:
            self._server, self.port = self._run(_started(silo, address, tls))
        except BaseException:
            self._end_loop()
            raise

    def wait(self) -> None:
        """Until it is stopped."""
        self._thread.join()

    def stop(self, grace_s: float | None = None) -> None:
        """Takes no further call, ends those that there are after so many seconds, and returns when it is over."""
        self._run(self._server.stop(grace_s))
        self._end_loop()

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def serve(silo: Silo, address: str, tls: ServiceTls | None = None, mode: int = 0o600) -> Service:
    """Starts the service.

    Args:
        silo: answers.
        address: ``unix:PATH``, or ``HOST:PORT`` with ``tls``; port 0 takes a free one.
        tls: who may connect over the network.
        mode: permissions of the Unix socket, in force from its first moment on.

    Raises:
        InputError: the socket's path is too long or taken, the address can't be listened on, or has no TLS.
    """
    if address.startswith("unix:"):
        _clear(Path(address.removeprefix("unix:")))
    elif tls is None:
        raise InputError(f"{address}: anybody could read what passes there; give a unix: address, or certificates")
    before = os.umask(0o777 & ~mode)
    try:
        return Service(silo, address, tls)
    finally:
        os.umask(before)


async def _started(silo: Silo, address: str, tls: ServiceTls | None) -> tuple[grpc.aio.Server, int]:
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 2 * CHUNK_BYTES)])
    servicer = SiloServicer(silo)
    silo_pb2_grpc.add_SiloServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(_Health(servicer), server)
    port = _bound(server, address, tls)
    await server.start()
    return server, port


def _bound(server: grpc.aio.Server, address: str, tls: ServiceTls | None) -> int:
    try:
        if tls is None:
            return int(server.add_insecure_port(address))
        pair = [(tls.key, tls.certificate)]
        credentials = grpc.ssl_server_credentials(pair, tls.authority, require_client_auth=True)
        return int(server.add_secure_port(address, credentials))
    except RuntimeError as error:
        raise InputError(f"{address}: can't listen there ({error}); give a free address of this machine") from None


def _clear(path: Path) -> None:
    """Removes a socket that a killed service left; anything else at the path is not ours to remove."""
    if len(str(path)) > _LONGEST_SOCKET_PATH:
        raise InputError(f"{path}: longer than {_LONGEST_SOCKET_PATH} characters; give a shorter path for the socket")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        return
    if not path.is_socket():
        raise InputError(f"{path}: is there, and is no socket; give another path for the socket")
    with socket_module.socket(socket_module.AF_UNIX) as probe:
        if probe.connect_ex(str(path)) == 0:
            raise InputError(f"{path}: another service listens there; end it, or give another path for the socket")
    path.unlink()
