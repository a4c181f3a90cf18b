"""Envelopes as Flower's messages."""

from flwr.app import ConfigRecord, RecordDict

RECORD, SHARED = "siloweave", "shared"
HEAD, CONTENT, TAIL = "head", "content", "tail"
_MARK = 64  # bytes to search for first: preparing the search for a whole adapter would take longest of all


class NoEnvelopeError(ValueError):
    """A message that ``pack`` has not made."""


def pack(envelope: bytes, shared: bytes = b"") -> RecordDict:
    """A request's or reply's envelope as a Flower message's content.

    Args:
        envelope: the bytes.
        shared: a part of it that other messages of the same step have, too, such as the adapter. It is a record of its
            own, so that the sender holds it, and Flower stores it, once per step and not once per silo.
    """
    at = envelope.find(shared[:_MARK])
    while at >= 0 and not envelope.startswith(shared, at):
        at = envelope.find(shared[:_MARK], at + 1)
    if at < 0:
        at, shared = 0, b""
    head, tail = envelope[:at], envelope[at + len(shared) :]
    return RecordDict({RECORD: ConfigRecord({HEAD: head, TAIL: tail}), SHARED: ConfigRecord({CONTENT: shared})})


def unpack(content: RecordDict) -> bytes:
    """The envelope that ``pack`` put in.

    Raises:
        NoEnvelopeError: the content was not made by ``pack``.
    """
    return b"".join(_parts(content))


def size_bytes(content: RecordDict) -> int:
    """How long the envelope is that ``unpack`` would give."""
    return sum(len(part) for part in _parts(content))


def _parts(content: RecordDict) -> list[bytes]:
    parts = []
    for name, key in ((RECORD, HEAD), (SHARED, CONTENT), (RECORD, TAIL)):
        record = content.get(name)
        part = record.get(key) if isinstance(record, ConfigRecord) else None
        if not isinstance(part, bytes):
            raise NoEnvelopeError("the message holds no siloweave envelope")
        parts.append(part)
    return parts
