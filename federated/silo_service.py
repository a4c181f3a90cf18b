"""A silo as a warm gRPC service on a Unix socket, with the standard health service."""

import os
import socket as socket_module
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from configs.errors import InputError
from federated import silo_pb2 as pb
from federated import silo_pb2_grpc
from federated.protocol import MAX_MESSAGE_BYTES
from federated.silo import Silo

SERVICE = "siloweave.v1.Silo"
_LONGEST_SOCKET_PATH = 100  # the system's limit is 108 bytes with the final zero


def _clear(path: Path) -> None:
    """Removes a socket that a killed service left; anything else at the path is not ours to remove."""
    if not path.exists():
        return
    if not path.is_socket():
        raise InputError(f"{path}: is there, and is no socket; give another path for the socket")
    with socket_module.socket(socket_module.AF_UNIX) as probe:
        if probe.connect_ex(str(path)) == 0:
            raise InputError(f"{path}: another service listens there; end it, or give another path for the socket")
    path.unlink()


class SiloServicer(silo_pb2_grpc.SiloServicer):
    """Hands the envelope's bytes to the silo and its answer back."""

    def __init__(self, silo: Silo) -> None:
        self._silo = silo

    def Handle(self, request: pb.Envelope, context: Any) -> pb.Envelope:  # noqa: ARG002, N802
        """One request."""
        return pb.Envelope(body=self._silo.handle(request.body, request.receipt))


def serve(silo: Silo, socket: Path) -> grpc.Server:
    """Starts the service on a Unix socket, readable by its owner only, and returns the running server.

    Raises:
        InputError: the socket's path is too long.
    """
    if len(str(socket)) > _LONGEST_SOCKET_PATH:
        raise InputError(f"{socket}: longer than {_LONGEST_SOCKET_PATH} characters; give a shorter path for the socket")
    socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _clear(socket)
    server = grpc.server(
        ThreadPoolExecutor(max_workers=4),
        options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)],
    )
    silo_pb2_grpc.add_SiloServicer_to_server(SiloServicer(silo), server)
    status = health.HealthServicer()
    status.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    before = os.umask(0o177)  # the socket is its owner's alone from its first moment on
    try:
        server.add_insecure_port(f"unix:{socket}")
        server.start()
    finally:
        os.umask(before)
    return server
