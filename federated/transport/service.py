"""A silo as a warm gRPC service, on a Unix socket or by mutual TLS, with the standard health service.

Every call holds a thread of gRPC's while bytes come or go, so how long that may take is bounded for each of them.
"""

import contextlib
import os
import socket as socket_module
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from configs.errors import InputError
from federated.protocol import silo_pb2 as pb
from federated.protocol import silo_pb2_grpc
from federated.protocol.framing import CHUNK_BYTES, QUEUE, SERVICE, chunks

MAX_WAITING = 4  # whole requests that wait while one is answered; more are sent away
MAX_TRANSFERS = 8  # requests and replies on their way at a time; a new one ends the one that has taken longest
TRANSFER_S = 120.0  # a request must have come, and a reply must have been fetched, in this time
_THREADS = 1 + MAX_WAITING + 3 * MAX_TRANSFERS  # transfers, questions about health, and what is just ending
_BUDGETS = ("budget_", "max_epsilon_", "max_open_runs", "max_request", "max_reservations", "max_runs_per_day")
_LONGEST_SOCKET_PATH = 100  # the system's limit is 108 bytes with the final zero


@dataclass(frozen=True)
class ServiceTls:
    """Mutual TLS, all PEM: the service's key and certificate, and the authority that signed the relay's."""

    key: bytes
    certificate: bytes
    authority: bytes


class _Transfers:
    """Messages that are on their way: few at a time, in bounded time and memory, whoever is at the other end."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._held: dict[Any, int] = {}  # bytes by call, oldest first

    @contextlib.contextmanager
    def one(self, context: Any) -> Iterator[None]:
        """A call's turn. It is cancelled where that takes too long, or a newer one needs the room."""
        clock = threading.Timer(TRANSFER_S, self._end, (context,))
        clock.daemon = True
        with self._lock:
            if len(self._held) >= MAX_TRANSFERS:
                self._end_oldest()
            self._held[context] = 0
        clock.start()
        try:
            yield
        finally:
            clock.cancel()
            with self._lock:
                in_time = self._held.pop(context, None) is not None
        if not in_time:  # a cancelled call may look as if all of it had come
            context.abort(grpc.StatusCode.CANCELLED, "the transfer took too long")

    def holds(self, context: Any, size_bytes: int) -> None:
        """Has a call hold so many bytes; older ones end where all together would hold too many."""
        with self._lock:
            if context in self._held:  # else it was told to end
                self._held[context] = size_bytes
            while sum(self._held.values()) > self._most_bytes and len(self._held) > 1:
                self._end_oldest(context)

    def _end_oldest(self, keep: Any = None) -> None:
        oldest = next(context for context in self._held if context is not keep)
        del self._held[oldest]
        oldest.cancel()

    def _end(self, context: Any) -> None:
        with self._lock:
            if self._held.pop(context, None) is not None:
                context.cancel()


class SiloServicer(silo_pb2_grpc.SiloServicer):
    """Hands envelopes to the silo and its answers back, one at a time.

    A caller that gives up changes nothing: what is charged stays charged, and the stored reply waits for it. A place
    among the requests that wait is for those that have come whole.

    Args:
        handle: answers an envelope with one; what it raises means that no reply can leave.
        max_request_bytes: of an envelope.
    """

    def __init__(self, handle: Callable[[bytes], bytes], max_request_bytes: int) -> None:
        self._handle, self._max_request_bytes = handle, max_request_bytes
        self._transfers = _Transfers(2 * max_request_bytes)
        self._places = threading.BoundedSemaphore(1 + MAX_WAITING)
        self._answers = True

    def takes_requests(self) -> bool:
        """Whether a request that came now would be answered: a place is free, and the last request was."""
        if not self._places.acquire(blocking=False):
            return False
        self._places.release()
        return self._answers

    def Exchange(self, request_iterator: Iterator[pb.Chunk], context: Any) -> Iterator[pb.Chunk]:  # noqa: N802
        """One request and its reply. A refusal is a reply, too, and the call then ends with its status code."""
        with self._transfers.one(context):
            request = self._received(request_iterator, context)
        if not self._places.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{QUEUE}: {MAX_WAITING} requests wait; ask again later")
        try:
            reply = self._answered(request, context)
        finally:
            self._places.release()
        with self._transfers.one(context):
            for part in chunks(reply):
                yield pb.Chunk(data=part)
        code = _status(reply)
        if code is not None:
            context.set_code(code)

    def _received(self, parts: Iterator[pb.Chunk], context: Any) -> bytes:
        """The whole envelope; nobody makes the service hold more than the policy allows."""
        received = bytearray()
        for part in parts:
            received += part.data
            if len(received) > self._max_request_bytes:
                allowed = f"max_request_bytes: allowed {self._max_request_bytes}"
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, allowed)
            self._transfers.holds(context, len(received))
        if not context.is_active():  # it has gone before anything was charged
            context.abort(grpc.StatusCode.CANCELLED, "the caller has gone")
        return bytes(received)

    def _answered(self, request: bytes, context: Any) -> bytes:
        reply = b""
        try:
            reply = self._handle(request)
        except Exception:  # the traffic log can't be written; and gRPC would send another exception's words
            self._answers = False
            context.abort(grpc.StatusCode.UNAVAILABLE, "no reply can leave now; ask again later")
        self._answers = True
        if _rule(reply) == QUEUE:  # not passed on as an answer: the relay asks again, as where no place is free
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{QUEUE}: a plan is accounted for; ask again later")
        return reply


def _health(servicer: SiloServicer) -> grpc.GenericRpcHandler:
    """The standard health service's Check. Watch, which would hold a call for ever, is unimplemented.

    It is read as a stream of one question: for a question that never comes, gRPC itself would wait for ever.
    """
    transfers, statuses = _Transfers(2**20), health_pb2.HealthCheckResponse

    def check(questions: Iterator[Any], context: Any) -> Iterator[Any]:
        with transfers.one(context):
            question = next(iter(questions), None)
        if question is None or question.service not in ("", SERVICE):
            context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        yield statuses(status=statuses.SERVING if servicer.takes_requests() else statuses.NOT_SERVING)

    handler = grpc.stream_stream_rpc_method_handler(
        check, health_pb2.HealthCheckRequest.FromString, health_pb2.HealthCheckResponse.SerializeToString
    )
    return grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": handler})


def _rule(reply: bytes) -> str | None:
    """The rule of a refusal; None for another reply."""
    answer = pb.Reply.FromString(pb.Envelope.FromString(reply).body)
    return str(answer.refusal.rule) if answer.WhichOneof("kind") == "refusal" else None


def _status(reply: bytes) -> grpc.StatusCode | None:
    """The status code of a refusal: whether it would never be allowed, or something is used up."""
    rule = _rule(reply)
    if rule is None:
        return None
    used_up = rule.startswith(_BUDGETS)
    return grpc.StatusCode.RESOURCE_EXHAUSTED if used_up else grpc.StatusCode.PERMISSION_DENIED


def serve(
    handle: Callable[[bytes], bytes],
    max_request_bytes: int,
    address: str,
    tls: ServiceTls | None = None,
    mode: int = 0o600,
) -> tuple[grpc.Server, int]:
    """Starts the service.

    Args:
        handle: answers an envelope with one.
        max_request_bytes: of an envelope.
        address: ``unix:PATH``, or ``HOST:PORT`` with ``tls``; port 0 takes a free one.
        tls: who may connect over the network.
        mode: permissions of the Unix socket, in force from its first moment on.

    Returns:
        The running server, and its port (1 for a Unix socket).

    Raises:
        InputError: the socket's path is too long or taken, the address can't be listened on, or has no TLS.
    """
    server = grpc.server(
        ThreadPoolExecutor(max_workers=_THREADS),
        options=[("grpc.max_receive_message_length", 2 * CHUNK_BYTES)],
        maximum_concurrent_rpcs=10 * _THREADS,  # those that wait for a thread; none does for long
    )
    servicer = SiloServicer(handle, max_request_bytes)
    silo_pb2_grpc.add_SiloServicer_to_server(servicer, server)
    server.add_generic_rpc_handlers((_health(servicer),))
    if address.startswith("unix:"):
        _clear(Path(address.removeprefix("unix:")))
    elif tls is None:
        raise InputError(f"{address}: anybody could read what passes there; give a unix: address, or certificates")
    before = os.umask(0o777 & ~mode)
    try:
        port = _bound(server, address, tls)
        server.start()
    finally:
        os.umask(before)
    return server, port


def _bound(server: grpc.Server, address: str, tls: ServiceTls | None) -> int:
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
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        raise InputError(f"{path}: longer than {_LONGEST_SOCKET_PATH} bytes; give a shorter path for the socket")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        return
    if not path.is_socket():
        raise InputError(f"{path}: exists, and is no socket; give another path for the socket")
    with socket_module.socket(socket_module.AF_UNIX) as probe:
        if probe.connect_ex(str(path)) == 0:
            raise InputError(f"{path}: another service listens there; end it, or give another path for the socket")
    path.unlink()
