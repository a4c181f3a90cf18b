"""What comes back from silos, decoded in one place: it is sound, or it is an ``UnsoundReply``.

A silo is a stranger with a key of its own: it chooses every byte of a reply and signs it. So a reply is looked at, and
what is in it is taken in, inside of ``sound_or_rejected`` alone: whatever that raises, of our own checks or from deep
inside a library, rejects the one reply, and the round goes on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from flwr.app import Message

from configs.errors import PolicyRefusal
from configs.printing import printable
from configs.storage.files import digest_bytes
from federated.protocol import silo_pb2 as pb
from federated.protocol.bounds import excess
from federated.protocol.envelope import reply_holds
from federated.transport.flower_messages import unpack

LARGEST_EXTRA_BYTES = 2**22  # of a reply beyond its request's: a receipt, a statement, their frames
_LARGEST_NAME, _LARGEST_DATASET, _LARGEST_REASON, _LARGEST_COUNT = 100, 255, 500, 10**12


class UnsoundReply(ValueError):
    """What a silo sent can't be used. One line."""


@dataclass(frozen=True)
class Asked:
    """What a reply has to fit. The request itself may hold an adapter, and so is not kept."""

    digest: str
    size_bytes: int

    @classmethod
    def of(cls, body: bytes, more_bytes: int = 0) -> "Asked":
        """What the reply to these bytes has to fit; it may have ``more_bytes`` than they."""
        return cls(digest_bytes(body), len(body) + more_bytes)


@dataclass(frozen=True)
class Answer:
    """A sound reply: of this silo, to this request.

    Attributes:
        silo: its name.
        reply: of the kind that was asked for.
        digest: of the reply's bytes, as the silo's own ledger holds it for what it released.
        body: these bytes.
    """

    silo: str
    reply: pb.Reply
    digest: str
    body: bytes


@contextmanager
def sound_or_rejected() -> Iterator[None]:
    """Turns every error into an ``UnsoundReply``, but a silo's own refusal.

    Raises:
        PolicyRefusal: the silo refuses.
        UnsoundReply: anything else went wrong.
    """
    try:
        yield
    except (PolicyRefusal, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except ValueError as error:
        raise UnsoundReply(one_line(str(error))) from None
    except BaseException as error:  # a panic inside of a library in Rust is no Exception
        raise UnsoundReply(one_line(f"{type(error).__name__}: {error}")) from None


def received(message: Message) -> bytes:
    """The envelope in a silo's message.

    Raises:
        ValueError: there is none.
    """
    if message.has_error():
        raise ValueError(message.error.reason or f"Flower reports error {message.error.code}")
    return unpack(message.content)


def opened(content: bytes, asked: Asked) -> tuple[pb.Envelope, pb.Reply]:
    """A silo's envelope and the reply in it.

    Raises:
        ValueError: it is none, is too long, or is to another request.
    """
    most = asked.size_bytes + LARGEST_EXTRA_BYTES
    if len(content) > most:
        raise ValueError(f"the reply has {len(content)} bytes, one to this request has at most {most}")
    envelope, reply = pb.Envelope(), pb.Reply()
    envelope.ParseFromString(content)
    reply.ParseFromString(envelope.body)
    if found := excess(envelope) or excess(reply):
        raise ValueError("the reply's {} has {}, allowed {}".format(*found))
    if reply.request_digest != asked.digest:
        raise ValueError("the reply is not to this request")
    return envelope, reply


def require_kind(reply: pb.Reply, kind: str) -> None:
    """Raises where a reply is not of the kind that was asked for.

    Raises:
        PolicyRefusal: it is a refusal.
        ValueError: it is something else.
    """
    found = reply.WhichOneof("kind")
    if found == "refusal":
        refusal = reply.refusal
        message = one_line(f"silo {reply.silo_id} refuses: {refusal.message}")
        rule, asked, allowed = map(one_line, (refusal.rule, refusal.asked, refusal.allowed))
        raise PolicyRefusal(message, rule=rule, asked=asked, allowed=allowed)
    if found != kind:
        raise ValueError(f"the reply is {found}: {reply.failure.code}" if found == "failure" else f"it is {found}")


def require_signed(envelope: pb.Envelope, public_key: str) -> None:
    """Raises a ValueError where a reply is not signed with a silo's key."""
    if not reply_holds(envelope, public_key):
        raise ValueError("the reply is not signed by the silo")


def require_description(reply: pb.Reply) -> None:
    """Raises a ValueError where what a silo says of itself is nothing that one can be."""
    described = reply.described
    for name, value, most in (
        ("name", reply.silo_id, _LARGEST_NAME),
        ("dataset", described.dataset_id, _LARGEST_DATASET),
    ):
        if not 1 <= len(value) <= most:
            raise ValueError(f"its {name} has {len(value)} characters, expected 1 to {most}")
    if not 1 <= described.public_record_count <= _LARGEST_COUNT:
        raise ValueError(f"its public_record_count is {described.public_record_count}, expected 1 to {_LARGEST_COUNT}")


def one_line(text: str) -> str:
    """A stranger's words as they may be logged and printed: one line, nothing that moves a cursor, not too long."""
    return printable(" ".join(text[:_LARGEST_REASON].split()))
