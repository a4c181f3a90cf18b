"""What arrives at a silo, before anything is done about it: parsing, and refusals as they leave."""

import json
import time
from typing import Any, cast, get_args

import numpy as np

from configs.errors import LARGEST_ECHO, InputError, PolicyRefusal
from configs.printing import printable
from configs.schema.federated import BaseDtype, Train, UpdateDtype
from federated.adapters.arrays import Arrays, check_shapes, from_bytes
from federated.adapters.update_codec import UPDATE_DTYPES
from federated.protocol import silo_pb2 as pb
from federated.protocol.bounds import excess
from federated.protocol.clocks import EXPIRES, shown
from federated.protocol.envelope import request_holds
from federated.protocol.framing import SPOKEN
from privacy.compression import Compression
from privacy.ledger.statements import Receipt
from trainer.models.adapters import Adaptation

LARGEST_TEXT = 2000  # characters of a refusal's message, and of what it says is allowed


def open_envelope(content: bytes, largest: int) -> pb.Envelope:
    """The envelope around a request.

    Raises:
        PolicyRefusal: it is none, or has more bytes than ``largest``.
    """
    if len(content) > largest:
        raise PolicyRefusal.of("max_request_bytes", f"{len(content)}", f"{largest}")
    envelope = pb.Envelope()
    _parse(envelope, content)
    return envelope


def decode(body: bytes, silo_id: str) -> pb.Request:
    """Parses a request and checks that it is for this silo, in a version that it speaks, and still valid.

    Raises:
        PolicyRefusal: it is not.
    """
    request = pb.Request()
    _parse(request, body)
    kind = request.WhichOneof("kind")
    if request.version not in SPOKEN:
        asked, allowed = str(request.version), " or ".join(map(str, SPOKEN))
        whom = "this silo" if request.version > max(SPOKEN) else "the coordinator"
        raise PolicyRefusal.of("version", asked, allowed, f"asked {asked}, allowed {allowed}: upgrade {whom}")
    if kind is None:
        raise PolicyRefusal.of("request", "no kind", "one that this silo knows")
    if kind != "describe" and request.silo_id != silo_id:
        raise PolicyRefusal.of("silo_id", request.silo_id, silo_id)
    if kind != "describe" and not request.run_id:
        raise PolicyRefusal.of("run_id", "empty", "the run's name")
    for name, value in (("run_id", request.run_id), ("request_id", request.request_id)):
        if not value.isprintable():  # the steward has to see it as it is, and to name it
            raise PolicyRefusal.of(name, value, "characters that are shown as they are")
    if request.expires < (now := time.time()):
        until, clock = shown(request.expires), shown(now)
        message = f"this silo's clock says {clock}, and the request is valid until {until}"
        raise PolicyRefusal.of(EXPIRES, until, f"after {clock}", message)
    return request


def check_sender(envelope: pb.Envelope, request: pb.Request, trusted: frozenset[str]) -> None:
    """Whether a coordinator that the steward trusts has signed this request, together with its receipt.

    Raises:
        PolicyRefusal: it has not.
    """
    if request.coordinator not in trusted:
        raise PolicyRefusal.of("coordinator", request.coordinator or "none", "a coordinator that the steward trusts")
    if not request_holds(envelope, request.coordinator):
        raise PolicyRefusal.of("signature", "one that does not hold", "the coordinator's own over the whole request")


def _parse(message: Any, content: bytes) -> None:
    try:
        message.ParseFromString(content)
    except Exception as error:  # protobuf's DecodeError lives in an untyped module
        raise PolicyRefusal.of("request", type(error).__name__, f"a serialized {type(message).__name__}") from None
    if found := excess(message):
        raise PolicyRefusal.of(*found)


def json_object(text: str) -> dict[str, Any]:
    """A plan's JSON.

    Raises:
        PolicyRefusal: it is no JSON object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise PolicyRefusal.of("plan", "not JSON", "a JSON object") from None
    if not isinstance(value, dict):
        raise PolicyRefusal.of("plan", type(value).__name__, "a JSON object")
    return value


def arrays(content: bytes, largest: float, rule: str = "adapter") -> Arrays:
    """A request's adapter, or another field's arrays, with values up to ``largest``.

    Raises:
        PolicyRefusal: it is no float32 safetensors, or a value is larger, or not finite.
    """
    try:
        found = from_bytes(content)
    except ValueError as error:
        raise PolicyRefusal.of(rule, str(error), "float32 safetensors") from None
    for name, array in found.items():
        reached = np.abs(array).max(initial=0.0)
        if not reached <= largest:  # true for a NaN, too
            raise PolicyRefusal.of("max_adapter_value", f"{reached:g} in {rule} {name}", f"{largest:g}")
    return found


def adaptation_of(spec: pb.AdapterSpec) -> Adaptation:
    """What of the model a request wants trained.

    Raises:
        PolicyRefusal: nothing that this silo knows.
    """
    train, base_dtype = spec.train or "lora", spec.base_dtype or "float32"
    if train not in get_args(Train):
        raise PolicyRefusal.of("train", train, ", ".join(get_args(Train)))
    known = get_args(BaseDtype) if train == "lora" else ("float32",)
    if base_dtype not in known:
        raise PolicyRefusal.of("base_dtype", base_dtype, f"{' or '.join(known)} where train is {train}")
    return Adaptation(spec.rank, spec.alpha, cast("Train", train), tuple(spec.targets), cast("BaseDtype", base_dtype))


def travels_in(train: pb.Train, compression: Compression | None) -> Compression | UpdateDtype:
    """How the update of a request is to travel: as its plan says, or in the request's type.

    Raises:
        PolicyRefusal: both say it, or the request names nothing that this silo knows.
    """
    if compression is None:
        return update_dtype_of(train)
    if train.update_dtype:
        asked = train.update_dtype
        raise PolicyRefusal.of("update_dtype", asked, "none: the plan's compression says how updates travel")
    return compression


def update_dtype_of(train: pb.Train) -> UpdateDtype:
    """What the arrays of an update are to travel in.

    Raises:
        PolicyRefusal: nothing that this silo knows.
    """
    dtype = train.update_dtype or "float32"
    if dtype not in UPDATE_DTYPES:
        raise PolicyRefusal.of("update_dtype", dtype, ", ".join(UPDATE_DTYPES))
    return dtype


def correction_of(train: pb.Train, largest: float) -> Arrays:
    """What SCAFFOLD adds to each gradient; empty where the request brings nothing.

    Raises:
        PolicyRefusal: it doesn't fit the request's adapter, or a value is above ``largest`` or not finite.
    """
    if not train.correction:
        return {}
    correction = arrays(train.correction, largest, "correction")
    try:
        check_shapes(correction, arrays(train.adapter, largest))
    except ValueError as error:
        raise PolicyRefusal.of("correction", str(error), "arrays in the adapter's shapes") from None
    return correction


def receipt_of(content: bytes) -> Receipt | None:
    """The receipt that came beside a request; None where there was none.

    Raises:
        PolicyRefusal: it is something else.
    """
    try:
        return Receipt.from_bytes(content, "receipt") if content else None
    except InputError:
        raise PolicyRefusal.of("receipt", "something else", "a receipt of this silo, as it was sent") from None


def refusal_message(refusal: PolicyRefusal) -> pb.Refusal:
    """A refusal as it leaves and is logged: one line, whatever was asked."""
    asked, allowed, message = map(printable, (refusal.asked[:LARGEST_ECHO], refusal.allowed, str(refusal)))
    return pb.Refusal(rule=refusal.rule, asked=asked, allowed=allowed[:LARGEST_TEXT], message=message[:LARGEST_TEXT])
