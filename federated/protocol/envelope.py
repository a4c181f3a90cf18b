"""Signed envelopes: a coordinator's around a request and the silo's last receipt, a silo's around its reply.

A signature covers digests under a label for the kind of message, so that none can stand for another kind.
"""

from configs.storage.files import digest_bytes
from federated.protocol import silo_pb2 as pb
from privacy.signing import Signer, signature_holds


def seal_request(signer: Signer, body: bytes, receipt: bytes = b"") -> bytes:
    """A request's envelope, signed by the coordinator."""
    signature = signer.sign(_request_message(body, receipt))
    return _serialized(pb.Envelope(body=body, receipt=receipt, signature=signature))


def request_holds(envelope: pb.Envelope, public_key: str) -> bool:
    """Whether the owner of ``public_key`` signed this body together with this receipt."""
    return signature_holds(public_key, _request_message(envelope.body, envelope.receipt), envelope.signature)


def seal_reply(signer: Signer, body: bytes) -> bytes:
    """A reply's envelope, signed by the silo. The body names the request's digest, so it answers no other."""
    return _serialized(pb.Envelope(body=body, signature=signer.sign(_reply_message(body))))


def reply_holds(envelope: pb.Envelope, public_key: str) -> bool:
    """Whether the owner of ``public_key`` signed this reply."""
    return signature_holds(public_key, _reply_message(envelope.body), envelope.signature)


def _serialized(envelope: pb.Envelope) -> bytes:
    return envelope.SerializeToString(deterministic=True)


def _request_message(body: bytes, receipt: bytes) -> bytes:
    return f"siloweave request 3\n{digest_bytes(body)}\n{digest_bytes(receipt)}".encode()


def _reply_message(body: bytes) -> bytes:
    return f"siloweave reply 3\n{digest_bytes(body)}".encode()
