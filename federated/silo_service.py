"""A silo as a warm gRPC service, on a Unix socket or by mutual TLS, with the standard health service."""

import os
import socket as socket_module
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from configs.errors import InputError
from federated import silo_pb2 as pb
from federated import silo_pb2_grpc
from federated.protocol import CHUNK_BYTES, SERVICE, chunks
from federated.silo import Silo

MAX_WAITING = 4  # requests that wait while one is answered; more are sent away
_BUDGETS = ("budget_", "max_epsilon_", "max_open_runs", "max_request", "max_reservations", "max_runs_per_day")
_LONGEST_SOCKET_PATH = 100  # the system's limit is 108 bytes with the final zero


@dataclass(frozen=True)
class ServiceTls:
    """Mutual TLS, all PEM: the service's key and certificate, and the authority that signed the relay's."""

    key: bytes
    certificate: bytes
    authority: bytes


class SiloServicer(silo_pb2_grpc.SiloServicer):
    """Hands envelopes to the silo and its answers back, one at a time.

    A caller that gives up changes nothing: what is charged stays charged, and the stored reply waits for it.
    """

    def __init__(self, silo: Silo) -> None:
        self._silo = silo
        self._places = threading.BoundedSemaphore(1 + MAX_WAITING)

    def Exchange(self, request_iterator: Iterator[pb.Chunk], context: Any) -> Iterator[pb.Chunk]:  # noqa: N802
        """One request and its reply. A refusal is a reply, too, and the call then ends with its status code."""
        if not self._places.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"queue: {MAX_WAITING} requests wait; ask again later")
        try:
            reply = self._silo.handle(self._received(request_iterator, context))
        finally:
            self._places.release()
        for part in chunks(reply):
            yield pb.Chunk(data=part)
        code = _status(reply)
        if code is not None:
            context.set_code(code)

    def _received(self, parts: Iterator[pb.Chunk], context: Any) -> bytes:
        """The whole envelope; nobody makes the service hold more than the policy allows."""
        largest, received = self._silo.config.policy.max_request_bytes, bytearray()
        for part in parts:
            received += part.data
            if len(received) > largest:
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"max_request_bytes: allowed {largest}")
        if not context.is_active():  # it has gone before anything was charged
            context.abort(grpc.StatusCode.CANCELLED, "the caller has gone")
        return bytes(received)


def _status(reply: bytes) -> grpc.StatusCode | None:
    """The status code of a refusal: whether it would never be allowed, or something is used up."""
    answer = pb.Reply.FromString(pb.Envelope.FromString(reply).body)
    if answer.WhichOneof("kind") != "refusal":
        return None
    used_up = answer.refusal.rule.startswith(_BUDGETS)
    return grpc.StatusCode.RESOURCE_EXHAUSTED if used_up else grpc.StatusCode.PERMISSION_DENIED


def serve(silo: Silo, address: str, tls: ServiceTls | None = None, mode: int = 0o600) -> tuple[grpc.Server, int]:
    """Starts the service.

    Args:
        silo: answers.
        address: ``unix:PATH``, or ``HOST:PORT`` with ``tls``; port 0 takes a free one.
        tls: who may connect over the network.
        mode: permissions of the Unix socket, in force from its first moment on.

    Returns:
        The running server, and its port (1 for a Unix socket).

    Raises:
        InputError: the socket's path is too long or taken, the address can't be listened on, or has no TLS.
    """
    server = grpc.server(
        ThreadPoolExecutor(max_workers=MAX_WAITING + 4),  # some are left for the health service
        options=[("grpc.max_receive_message_length", 2 * CHUNK_BYTES)],
    )
    silo_pb2_grpc.add_SiloServicer_to_server(SiloServicer(silo), server)
    status = health.HealthServicer()
    status.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
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
