"""Messages as bytes: a header (format, version, kind, the round's digest), then fields with their lengths.

What a silo sends is signed with its own Ed25519 key, header and all. What the server sends is not: a silo believes
nothing of it that the silos have not signed.
"""

import struct
from collections.abc import Mapping
from enum import IntEnum
from hashlib import sha256

from privacy.secagg.failures import (
    EarlyMessage,
    ForgedMessage,
    LateMessage,
    MalformedMessage,
    UnknownSilo,
    UnknownVersion,
    WrongContext,
)
from privacy.signing import Signer, signature_holds

VERSION = 1
_HEADER = struct.Struct(">4sBB32s")
_MAGIC = b"SWSA"
_LENGTH = struct.Struct(">I")


class Phase(IntEnum):
    """The five exchanges of a round. In each the silos send something, and the server answers those that did."""

    KEYS = 1
    SHARES = 2
    MASKED = 3
    SURVIVORS = 4
    REVEALED = 5


def pack(*fields: bytes) -> bytes:
    """Fields one after the other, each with its length."""
    return b"".join(part for field in fields for part in (_LENGTH.pack(len(field)), field))


def unpack(packed: bytes, count: int | None = None, start: int = 0) -> list[bytes]:
    """The fields again, from some place on.

    Raises:
        MalformedMessage: there is too little, too much, or another number of fields.
    """
    fields = []
    while start < len(packed):
        if start + _LENGTH.size > len(packed):
            raise MalformedMessage("a message is truncated")
        end = start + _LENGTH.size + _LENGTH.unpack_from(packed, start)[0]
        if end > len(packed):
            raise MalformedMessage("a message is truncated")
        fields.append(packed[start + _LENGTH.size : end])
        start = end
    if count is not None and len(fields) != count:
        raise MalformedMessage(f"a message has {len(fields)} fields where {count} are due")
    return fields


def text(field: bytes) -> str:
    """A silo's name.

    Raises:
        MalformedMessage: it is not UTF-8.
    """
    try:
        return field.decode()
    except UnicodeDecodeError:
        raise MalformedMessage("a silo's name is not UTF-8") from None


def server_message(phase: Phase, digest: bytes, *fields: bytes) -> bytes:
    """What the server answers in a phase."""
    return _HEADER.pack(_MAGIC, VERSION, phase + 16, digest) + pack(*fields)


def open_server_message(message: bytes, phase: Phase, digest: bytes, count: int | None = None) -> list[bytes]:
    """Its fields.

    Raises:
        MalformedMessage, UnknownVersion, LateMessage, EarlyMessage, WrongContext: see there.
    """
    _check_header(message, phase + 16, digest)
    return unpack(message, count, _HEADER.size)


def silo_message(signer: Signer, name: str, phase: Phase, digest: bytes, body: bytes) -> bytes:
    """What a silo sends in a phase, signed."""
    signed = _HEADER.pack(_MAGIC, VERSION, phase, digest) + pack(name.encode(), body)
    return signed + pack(bytes.fromhex(signer.sign(_signed(signed))))


def open_silo_message(message: bytes, phase: Phase, digest: bytes, roster: Mapping[str, str]) -> tuple[str, bytes]:
    """The silo that signed a message, and the message's body.

    Raises:
        MalformedMessage, UnknownVersion, LateMessage, EarlyMessage, WrongContext, UnknownSilo, ForgedMessage: see
            there.
    """
    _check_header(message, phase, digest)
    field, body, signature = unpack(message, 3, _HEADER.size)
    name = text(field)
    if name not in roster:
        raise UnknownSilo("a message is of a silo that the roster lacks")
    signed = memoryview(message)[: len(message) - _LENGTH.size - len(signature)]
    if not signature_holds(roster[name], _signed(signed), signature.hex()):
        raise ForgedMessage(f"a message is not signed by {name}, as whose it came")
    return name, body


def _signed(message: bytes | memoryview) -> bytes:
    """What a signature covers: under a label, so that it can't stand for anything else that a silo signs."""
    return b"siloweave secure aggregation message 1\n" + sha256(message).digest()


def _check_header(message: bytes, kind: int, digest: bytes) -> None:
    if len(message) < _HEADER.size or not message.startswith(_MAGIC):
        raise MalformedMessage("this is no message of secure aggregation, or it is truncated")
    _, version, found, other = _HEADER.unpack_from(message)
    if version != VERSION:
        raise UnknownVersion(f"a message of version {version}; this is version {VERSION}")
    if other != digest:
        raise WrongContext("a message is of another round, model, adapter, plan, roster or rule")
    if found // 16 != kind // 16 or found % 16 not in list(Phase):
        raise MalformedMessage("a message is of no kind that is due here")
    if found != kind:
        late = found < kind
        raise (LateMessage if late else EarlyMessage)(f"a message of phase {found % 16} came in phase {kind % 16}")
