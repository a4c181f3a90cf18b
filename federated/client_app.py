"""The Flower ClientApp: a thin relay between Flower's messages and a silo. Imports neither torch nor any data."""

from collections.abc import Callable

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from federated.silo_client import exchange

RECORD, ENVELOPE = "siloweave", "envelope"

Handler = Callable[[bytes], bytes]
Connect = Callable[[Context], Handler]


def pack(envelope: bytes) -> RecordDict:
    """A request's or reply's envelope as a Flower message's content."""
    return RecordDict({RECORD: ConfigRecord({ENVELOPE: envelope})})


def unpack(content: RecordDict) -> bytes:
    """The envelope that ``pack`` put in.

    Raises:
        ValueError: the content was not made by ``pack``.
    """
    record = content.get(RECORD)
    envelope = record.get(ENVELOPE) if isinstance(record, ConfigRecord) else None
    if not isinstance(envelope, bytes):
        raise ValueError("the message holds no siloweave envelope")
    return envelope


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
    """
    address, folder = str(context.node_config["silo-address"]), str(context.node_config.get("silo-tls", ""))
    return lambda envelope: exchange(address, envelope, tls_folder=folder)
