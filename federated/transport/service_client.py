"""Asks a silo service: what the relay uses. Imports neither torch nor any data."""

import logging
import time
from pathlib import Path

import grpc

from configs.printing import printable
from federated.protocol import silo_pb2 as pb
from federated.protocol import silo_pb2_grpc
from federated.protocol.framing import CHUNK_BYTES, chunks
from federated.transport.health import DIRECT

LONGEST_TRAINING_S = 24 * 3600.0
# With these codes a call ends after the silo's signed refusal has been sent.
REFUSED = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.RESOURCE_EXHAUSTED)
# After these codes the same request is sent again; where a code alone doesn't decide, its details have to begin so.
# That is safe: a silo charges a request once at most, and gives the reply that it has stored, or computes it again with
# the same noise.
_AGAIN = {
    grpc.StatusCode.UNAVAILABLE: "",  # not there, or gone while it answered
    grpc.StatusCode.CANCELLED: "",  # the service was stopped
    grpc.StatusCode.RESOURCE_EXHAUSTED: "queue:",
    grpc.StatusCode.DEADLINE_EXCEEDED: "transfer:",
}
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _LONGEST_DETAIL = 0.5, 10.0, 200
_log = logging.getLogger("siloweave.relay")
KEY, CERTIFICATE, AUTHORITY = "relay.key", "relay.crt", "service-ca.crt"


class UnansweredError(ConnectionError):
    """Why a silo's service has given no answer, in one line."""


def ask(address: str, envelope: bytes, tls_folder: str = "", timeout_s: float = LONGEST_TRAINING_S) -> bytes:
    """Sends one envelope, again and again until the silo's service answers it or says that it never will.

    Args:
        address: see ``ask_service``.
        envelope: see ``ask_service``.
        tls_folder: see ``ask_service``.
        timeout_s: seconds for all attempts together.

    Raises:
        UnansweredError: the time is over, or asking again would not help, or a file of ``tls_folder`` can't be read.
    """
    deadline, pause_s = time.monotonic() + timeout_s, _FIRST_PAUSE_S
    while True:
        try:
            return ask_service(address, envelope, tls_folder, max(deadline - time.monotonic(), 0.0))
        except grpc.RpcError as error:
            said, left_s = _said(error), deadline - time.monotonic()
            if pause_s >= left_s or not _helps_to_ask_again(error):
                raise UnansweredError(f"its service at {address} gave no answer ({said})") from None
        _log.warning("silo service %s: %s; asked again in %g s, until %.0f s from now", address, said, pause_s, left_s)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _helps_to_ask_again(error: grpc.RpcError) -> bool:
    begins = _AGAIN.get(error.code())
    return begins is not None and (error.details() or "").startswith(begins)


def _said(error: grpc.RpcError) -> str:
    details = " ".join((error.details() or "no details").split())[:_LONGEST_DETAIL]
    return f"{error.code().name}: {printable(details)}"


def ask_service(address: str, envelope: bytes, tls_folder: str = "", timeout_s: float = LONGEST_TRAINING_S) -> bytes:
    """Sends one envelope once, and returns the silo's.

    Args:
        address: ``unix:PATH``, or ``HOST:PORT`` with ``tls_folder``.
        envelope: a request's, serialized.
        tls_folder: holds the relay's key and certificate, and the authority that signed the service's.
        timeout_s: seconds to wait. A silo that has begun to train goes on all the same, and keeps its reply.

    Raises:
        grpc.RpcError: the service is not there, or busy; or it has no such answer.
        UnansweredError: a file of ``tls_folder`` can't be read.
    """
    options = [("grpc.max_receive_message_length", 2 * CHUNK_BYTES), *DIRECT]
    with _channel(address, tls_folder, options) as channel:
        received = bytearray()
        parts = (pb.Chunk(data=part) for part in chunks(envelope))
        try:
            for chunk in silo_pb2_grpc.SiloStub(channel).Exchange(parts, timeout=timeout_s):
                received += chunk.data
        except grpc.RpcError as error:
            if not received or error.code() not in REFUSED:
                raise
        return bytes(received)


def _channel(address: str, tls_folder: str, options: list[tuple[str, int]]) -> grpc.Channel:
    if not tls_folder:
        return grpc.insecure_channel(address, options=options)
    try:
        key, certificate, authority = (Path(tls_folder, name).read_bytes() for name in (KEY, CERTIFICATE, AUTHORITY))
    except OSError as error:
        reason = printable(f"{error.filename}: can't be read ({error.strerror})")
        raise UnansweredError(f"{reason}; put the file there, or let silo-tls name the relay's folder") from None
    credentials = grpc.ssl_channel_credentials(authority, key, certificate)
    return grpc.secure_channel(address, credentials, options=options)
