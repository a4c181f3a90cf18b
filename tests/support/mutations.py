"""What a silo may send instead of what it should: files, receipts and replies with junk in them, and signed."""

import json
import math
import random
import struct
from contextlib import suppress

import numpy as np
from signed_silos import adapter

from configs.storage.files import canonical_json
from federated.adapters.arrays import to_bytes
from federated.protocol import silo_pb2 as pb
from federated.protocol.envelope import seal_reply

NUMBERS = (0, -1, 1, 2**31, 2**53 + 1, 2**64, 10**400, 0.5, -0.0, 1e-320, 1e308, math.nan, math.inf, -math.inf)
JUNK = (*NUMBERS, None, True, "", "x", "\ud800", "\x1b[2J", "a" * 5000, [], {}, [[]] * 3, {"a": {"b": [1]}})


def safetensors(header, data=b""):
    """A file with this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def header_of(content):
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


BITS = {"BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F16": 16, "F64": 64, "I64": 64}
BITS |= {"BOOL": 8, "U8": 8, "I32": 32, "C64": 64, "nothing": 8}


def typed(names, kind, values=8):
    """A file of so many values of a type, each array sound in itself."""
    size = values * BITS[kind] // 8
    header = {
        name: {"dtype": kind, "shape": [values], "data_offsets": [size * at, size * (at + 1)]}
        for at, name in enumerate(names)
    }
    return safetensors(header, bytes(size * len(names)))


UNREADABLE = (ValueError, LookupError, RecursionError, AttributeError, TypeError, struct.error)


class Hostile:
    """Answers a training request with a reply that was changed in one to three places, chosen by a seed."""

    def __init__(self):
        self.random = random.Random()

    def __call__(self, silo, reply, request):
        if not reply.HasField("trained"):
            return reply
        made = reply
        for _ in range(self.random.choice((1, 1, 2, 3))):
            with suppress(*UNREADABLE):  # what was changed before
                made = self.random.choice(CHANGES)(self.random, silo, reply, request)
            if isinstance(made, bytes):
                return made
        return made


def change_field(choose, silo, reply, request):
    """A receipt with junk in a field, or without it, or with one more, and a signature that holds as far as one can."""
    tree = json.loads(reply.trained.receipt)
    place = tree
    if choose.random() < 0.3 and tree.get("spends"):
        place = tree["spends"][0]
    if isinstance(place, dict):
        name = choose.choice([*place, "another"])
        value = choose.choice(JUNK)
        if choose.random() < 0.4 and isinstance(place.get(name), float):  # something that could be true
            value = place[name] * choose.choice((0.0, 0.5, 1 - 1e-5, 1 + 1e-5, 2.0))
        place.pop(name, None) if choose.random() < 0.1 else place.update({name: value})
    reply.trained.receipt = signed(silo, tree)
    return reply


def signed(silo, tree):
    tree.pop("signature", None)
    try:
        tree["signature"] = silo.signer.sign(canonical_json(tree))
    except ValueError:  # a NaN: no canonical JSON
        tree["signature"] = "00" * 64
    return json.dumps(tree).encode()


def change_bytes_of(choose, content):
    made = bytearray(content)
    for _ in range(choose.choice((1, 1, 4))):
        at = choose.randrange(len(made)) if made else 0
        made[at : at + choose.choice((0, 1, 1, 4))] = choose.randbytes(choose.choice((0, 1, 3)))
    return bytes(made)


def change_receipt_bytes(choose, _silo, reply, _request):
    bombs = (b"[" * 10_000, b'{"a":' * 6000, b"9" * 5000, b"NaN", b"\xff", b"", b'{"a":1,"a":2}', b"{" + b" " * 2**10)
    some = change_bytes_of(choose, reply.trained.receipt)
    reply.trained.receipt = choose.choice((some, some, some, *bombs))
    return reply


def change_header(choose, _silo, reply, _request):
    header, data = header_of(reply.trained.update)
    name = choose.choice(list(header)) if header else "a"
    entry = header.setdefault(name, {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
    what = choose.randrange(5)
    if what == 0 and isinstance(entry, dict):
        entry["dtype"] = choose.choice((*BITS, *JUNK))
    elif what == 1 and isinstance(entry, dict):
        entry["shape"] = choose.choice(([], [0], [0, 2**63], [12], [2**32], [-1], [1] * 100, *JUNK))
    elif what == 2 and isinstance(entry, dict):
        entry["data_offsets"] = choose.choice(([0, 0], [0, 2**62], [4, 0], [1, 5], *JUNK))
    elif what == 3:
        header[choose.choice(("x", "__metadata__", ""))] = choose.choice((entry, *JUNK))
    else:
        header.pop(name)
    reply.trained.update = safetensors(header, data)
    return reply


def change_type(choose, _silo, reply, _request):
    reply.trained.update = typed(adapter(), choose.choice(list(BITS)), choose.choice((0, 8, 24)))
    return reply


def change_values(choose, _silo, reply, _request):
    shapes = {name: array.shape for name, array in adapter().items()}
    kinds = (np.nan, np.inf, -np.inf, 3.4e38, 2.0**15, -(2.0**14), 1e-45, 0.0)
    arrays = {name: np.full(shape, choose.choice(kinds), np.float32) for name, shape in shapes.items()}
    if choose.random() < 0.3:
        arrays[choose.choice(list(arrays))] = np.zeros(choose.choice(((), (0,), (4, 3), (1, 1, 1), (0, 7))), np.float32)
    reply.trained.update = to_bytes(arrays)
    return reply


def change_update_bytes(choose, _silo, reply, _request):
    reply.trained.update = change_bytes_of(choose, reply.trained.update)
    return reply


def change_reply(choose, silo, reply, request):
    what = choose.randrange(7)
    if what == 0:
        reply.silo_id = choose.choice(("good", "", "x" * 1000))
    elif what == 1:
        reply.request_digest = choose.choice(("", "00" * 32, "x" * 1000))
    elif what == 2:
        reply.refusal.CopyFrom(pb.Refusal(rule="\x00", asked="\x1b", allowed="\n", message="\r" * 1000))
    elif what == 3:
        reply.failure.code = choose.choice(("FAILED", "\x1b[2J" * 1000))
    elif what == 4:
        reply.closed.receipt = silo.receipt(request.run_id).to_bytes()
    elif what == 5:
        reply.evaluated.sums.extend([math.nan, 1e308])
    else:
        reply.described.public_record_count = 2**64 - 1
    return reply


def change_envelope(choose, silo, reply, _request):
    content = seal_reply(silo.signer, reply.SerializeToString())
    kind = choose.randrange(4)
    if kind == 0:
        return choose.randbytes(choose.randrange(200))
    if kind == 1:
        return seal_reply(silo.signer, change_bytes_of(choose, reply.SerializeToString()))
    if kind == 2:
        return seal_reply(silo.signer, reply.SerializeToString() + bytes(choose.choice((1, 1000))))
    return change_bytes_of(choose, content)


CHANGES = (
    *(change_field, change_field, change_receipt_bytes, change_header, change_header),
    *(change_type, change_values, change_update_bytes, change_reply, change_envelope),
)
