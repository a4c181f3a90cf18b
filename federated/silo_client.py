"""Asks a silo service: what the relay uses. Imports neither torch nor any data."""

from pathlib import Path

import grpc

from federated import silo_pb2 as pb
from federated import silo_pb2_grpc
from federated.protocol import CHUNK_BYTES, chunks

LONGEST_TRAINING_S = 24 * 3600.0
# Beside these codes the silo has sent its signed refusal.
REFUSED = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.RESOURCE_EXHAUSTED)
KEY, CERTIFICATE, AUTHORITY = "relay.key", "relay.crt", "service-ca.crt"


def exchange(address: str, envelope: bytes, tls_folder: str = "", timeout_s: float = LONGEST_TRAINING_S) -> bytes:
    """Sends one envelope and returns the silo's.

    Args:
        address: ``unix:PATH``, or ``HOST:PORT`` with ``tls_folder``.
        envelope: a request's, serialized.
        tls_folder: holds the relay's key and certificate, and the authority that signed the service's.
        timeout_s: seconds to wait. A silo that has begun to train goes on all the same, and keeps its reply.

    Raises:
        grpc.RpcError: the service is not there, or busy; or it has no such answer.
    """
    options = [("grpc.max_receive_message_length", 2 * CHUNK_BYTES)]
    with _channel(address, tls_folder, options) as channel:
        received = bytearray()
        parts = (pb.Chunk(data=part) for part in chunks(envelope))
        try:
            for chunk in silo_pb2_grpc.SiloStub(channel).Exchange(parts, wait_for_ready=True, timeout=timeout_s):
                received += chunk.data
        except grpc.RpcError as error:
            if not received or error.code() not in REFUSED:
                raise
        return bytes(received)


def _channel(address: str, tls_folder: str, options: list[tuple[str, int]]) -> grpc.Channel:
    if not tls_folder:
        return grpc.insecure_channel(address, options=options)
    key, certificate, authority = (Path(tls_folder, name).read_bytes() for name in (KEY, CERTIFICATE, AUTHORITY))
    credentials = grpc.ssl_channel_credentials(authority, key, certificate)
    return grpc.secure_channel(address, credentials, options=options)
