"""The Flower ClientApp: a thin relay between Flower's messages and a silo. Imports neither torch nor any data."""

import os
from collections.abc import Callable
from functools import partial

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from federated.silo_client import exchange

RECORD, SHARED = "siloweave", "shared"
HEAD, CONTENT, TAIL = "head", "content", "tail"

Handler = Callable[[bytes], bytes]
Connect = Callable[[Context], Handler]


def pack(envelope: bytes, shared: bytes = b"") -> RecordDict:
    """A request's or reply's envelope as a Flower message's content.

    Args:
        envelope: the bytes.
        shared: a part of it that other messages of the same step have, too, such as the adapter. It is a record of its
            own, so that the sender holds it, and Flower stores it, once a step and not once a silo.
    """
    head, found, tail = envelope.partition(shared) if shared else (envelope, b"", b"")
    content = shared if found else b""
    return RecordDict({RECORD: ConfigRecord({HEAD: head, TAIL: tail}), SHARED: ConfigRecord({CONTENT: content})})


def unpack(content: RecordDict) -> bytes:
    """The envelope that ``pack`` put in.

    Raises:
        ValueError: the content was not made by ``pack``.
    """
    parts = []
    for name, key in ((RECORD, HEAD), (SHARED, CONTENT), (RECORD, TAIL)):
        record = content.get(name)
        parts.append(record.get(key) if isinstance(record, ConfigRecord) else None)
    if not all(isinstance(part, bytes) for part in parts):
        raise ValueError("the message holds no siloweave envelope")
    return b"".join(part for part in parts if isinstance(part, bytes))


def make_app(connect: Connect) -> ClientApp:
    """A ClientApp that hands every message to the silo that ``connect`` finds for its context."""
    app = ClientApp()

    def relay(message: Message, context: Context) -> Message:
        return Message(pack(connect(context)(unpack(message.content))), reply_to=message)

    app.train()(relay)
    app.query()(relay)
    return app


def silo_service(context: Context) -> Handler:
    """Reaches the silo service at the SuperNode's ``silo-address``.

    It is ``unix:/run/silo.sock``, or ``HOST:PORT`` by mutual TLS with key and certificates in the folder ``silo-tls``.
    Flower's own simulation engine gives its nodes nothing but a partition id: there it is the address with this number
    among those that SILOWEAVE_SILO_ADDRESSES lists, separated by spaces.
    """
    node = context.node_config
    if "silo-address" in node:
        address = str(node["silo-address"])
    else:
        address = os.environ["SILOWEAVE_SILO_ADDRESSES"].split()[int(node["partition-id"])]
    return partial(exchange, address, tls_folder=str(node.get("silo-tls", "")))
