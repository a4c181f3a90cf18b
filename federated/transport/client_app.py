"""The Flower ClientApp: a thin relay between Flower's messages and a silo. Imports neither torch nor any data."""

import os
import time
from collections.abc import Callable
from functools import partial

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from federated.transport.flower_messages import NoEnvelopeError, pack, unpack
from federated.transport.flower_messages import takes_pieces as other_takes_pieces
from federated.transport.service_client import UnansweredError, ask

_GAVE_UP = 2  # Flower's code for a ClientApp that failed
_TO_SAY_SO_S = 2.0  # of a message's time: a reply that comes later is thrown away by Flower

Handler = Callable[[bytes], bytes]
Connect = Callable[[Context, float], Handler]


def make_app(connect: Connect) -> ClientApp:
    """A ClientApp that hands each message to the silo that ``connect`` finds by its context, in the seconds left."""
    app = ClientApp()

    def relay(message: Message, context: Context) -> Message:
        return answered(message, connect(context, seconds_left(message)))

    app.train()(relay)
    app.query()(relay)
    return app


def answered(message: Message, ask_silo: Handler, *, takes_pieces: bool = False) -> Message:
    """The silo's reply as a message; an error's message where there is none.

    Args:
        message: the coordinator's.
        ask_silo: answers an envelope with one.
        takes_pieces: whether this end carries pieces one by one, which Flower's own SuperNode does not.
    """
    try:
        answer = ask_silo(unpack(message.content))
    except (UnansweredError, NoEnvelopeError) as error:  # Flower would log the traceback of what is raised on
        return Message(Error(_GAVE_UP, str(error)), reply_to=message)
    in_pieces = takes_pieces and other_takes_pieces(message.content)
    return Message(pack(answer, takes_pieces=takes_pieces, in_pieces=in_pieces), reply_to=message)


def seconds_left(message: Message) -> float:
    """Seconds until a message's sender stops waiting for the reply.

    Flower delivers no message after its time. So one that seems over, or not begun, was sent by another clock, and
    its time is counted from now.
    """
    ttl_s, age_s = message.metadata.ttl, time.time() - message.metadata.created_at
    left_s = ttl_s - age_s if 0 <= age_s < ttl_s else ttl_s
    return max(left_s - min(_TO_SAY_SO_S, ttl_s / 10), 0.0)


def reach_service(context: Context, timeout_s: float) -> Handler:
    """Reaches the silo service at the SuperNode's ``silo-address``, for so many seconds.

    It is ``unix:/run/silo.sock``, or ``HOST:PORT`` by mutual TLS with key and certificates in the folder ``silo-tls``.
    Flower's own simulation engine gives its nodes nothing but a partition id: there it is the address with this number
    among those that SILOWEAVE_SILO_ADDRESSES lists, separated by spaces.
    """
    node = context.node_config
    if "silo-address" in node:
        address = str(node["silo-address"])
    else:
        address = os.environ["SILOWEAVE_SILO_ADDRESSES"].split()[int(node["partition-id"])]
    return partial(ask, address, tls_folder=str(node.get("silo-tls", "")), timeout_s=timeout_s)
