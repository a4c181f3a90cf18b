"""Envelopes as Flower's messages: a long one in pieces, each an object of Flower's, which is sent only where it lacks.

Each end says in every message whether it reads pieces, so an end that knows of none is sent none.
"""

from collections.abc import Iterator
from functools import lru_cache
from hashlib import sha256

from flwr.app import ConfigRecord, RecordDict

RECORD, SHARED = "siloweave", "shared"
HEAD, CONTENT, TAIL = "head", "content", "tail"
TAKES, COUNT, DIGEST = "takes-pieces-of", "pieces", "sha256"
# Where a line is cut, what is on its way is lost: two pieces, each half sent. In 30 s of 10 Mbit/s that is 3 percent.
PIECE_BYTES = 2**20
MOST_PIECES = 2**11 + 4  # of an envelope, which protobuf allows 2 GiB, in up to three parts
_MARK = 64  # bytes to search for first: preparing the search for a whole adapter would take longest of all


class NoEnvelopeError(ValueError):
    """A message that ``pack`` has not made."""


def pack(envelope: bytes, shared: bytes = b"", *, takes_pieces: bool = True, in_pieces: bool = False) -> RecordDict:
    """A request's or reply's envelope as a Flower message's content.

    Args:
        envelope: the bytes.
        shared: a part of it that other messages of the same step have, too, such as the adapter. It is in records of
            its own, so that the sender holds it, and Flower stores it, once per step and not once per silo.
        takes_pieces: whether this end reads pieces.
        in_pieces: whether the other end does.
    """
    at = envelope.find(shared[:_MARK])
    while at >= 0 and not envelope.startswith(shared, at):
        at = envelope.find(shared[:_MARK], at + 1)
    if at < 0:
        at, shared = 0, b""
    head, tail = envelope[:at], envelope[at + len(shared) :]
    says = {TAKES: PIECE_BYTES} if takes_pieces else {}
    if not in_pieces or len(envelope) <= PIECE_BYTES:
        return RecordDict({RECORD: ConfigRecord({HEAD: head, TAIL: tail, **says}), SHARED: _record(shared)})
    pieces = [*_cut(head), *_cut_shared(shared), *_cut(tail)]
    index = ConfigRecord({HEAD: b"", TAIL: b"", **says, COUNT: len(pieces), DIGEST: sha256(envelope).digest()})
    named = {str(number): piece for number, piece in enumerate(pieces)}
    return RecordDict({RECORD: index, SHARED: _record(b""), **named})


def _record(content: bytes) -> ConfigRecord:
    return ConfigRecord({CONTENT: content})


def _cut(content: bytes) -> Iterator[ConfigRecord]:
    for start in range(0, len(content), PIECE_BYTES):
        yield _record(content[start : start + PIECE_BYTES])


@lru_cache(maxsize=1)
def _cut_shared(shared: bytes) -> tuple[ConfigRecord, ...]:
    """The same records for all silos of a step, which hold one copy of it together."""
    return tuple(_cut(shared))


def takes_pieces(content: RecordDict) -> bool:
    """Whether the sender of a message reads pieces."""
    record = content.get(RECORD)
    return isinstance(record, ConfigRecord) and record.get(TAKES) == PIECE_BYTES


def unpack(content: RecordDict) -> bytes:
    """The envelope that ``pack`` put in.

    Raises:
        NoEnvelopeError: the content was not made by ``pack``, or is not whole.
    """
    envelope = b"".join(_parts(content))
    index = content[RECORD]
    if COUNT in index and index.get(DIGEST) != sha256(envelope).digest():
        raise NoEnvelopeError("the message's pieces are not what it was cut into: their digest is another one")
    return envelope


def size_bytes(content: RecordDict) -> int:
    """How long the envelope is that ``unpack`` would give."""
    return sum(len(part) for part in _parts(content))


def _parts(content: RecordDict) -> list[bytes]:
    whole = [_bytes(content, name, key) for name, key in ((RECORD, HEAD), (SHARED, CONTENT), (RECORD, TAIL))]
    count = content[RECORD].get(COUNT, 0)
    if not isinstance(count, int) or not 0 <= count <= MOST_PIECES:
        raise NoEnvelopeError(f"the message says a number of pieces that is none from 0 to {MOST_PIECES}")
    pieces = [_bytes(content, str(number), CONTENT) for number in range(count)]
    if any(len(piece) > PIECE_BYTES for piece in pieces):
        raise NoEnvelopeError(f"the message has a piece of more than {PIECE_BYTES} bytes")
    return [*whole, *pieces]


def _bytes(content: RecordDict, name: str, key: str) -> bytes:
    record = content.get(name)
    part = record.get(key) if isinstance(record, ConfigRecord) else None
    if not isinstance(part, bytes):
        raise NoEnvelopeError("the message holds no siloweave envelope")
    return part


def again(group: str, earlier: list[str]) -> str:
    """The group id of a message that is sent once more: it says under which ids it was sent before."""
    return " ".join([group, *earlier])


def sent_before(group_id: str) -> set[str]:
    """The ids under which a message was sent before; the first word is the step's."""
    return set(group_id.split(" ")[1:])
