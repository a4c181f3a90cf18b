"""The Flower ClientApp: a thin relay between Flower's messages and a silo. Imports neither torch nor any data."""

from collections.abc import Callable

import grpc
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from federated import silo_pb2 as pb
from federated import silo_pb2_grpc
from federated.protocol import MAX_MESSAGE_BYTES

RECORD, BODY = "siloweave", "body"

Handler = Callable[[bytes], bytes]
Connect = Callable[[Context], Handler]


def pack(body: bytes) -> RecordDict:
    """A request's or reply's bytes as a Flower message's content."""
    return RecordDict({RECORD: ConfigRecord({BODY: body})})


def unpack(content: RecordDict) -> bytes:
    """The bytes that ``pack`` put in.

    Raises:
        ValueError: the content was not made by ``pack``.
    """
    record = content.get(RECORD)
    body = record.get(BODY) if isinstance(record, ConfigRecord) else None
    if not isinstance(body, bytes):
        raise ValueError("the message holds no siloweave body")
    return body


def make_app(connect: Connect) -> ClientApp:
    """A ClientApp that hands every message to the silo that ``connect`` finds for its context."""
    app = ClientApp()

    def relay(message: Message, context: Context) -> Message:
        return Message(pack(connect(context)(unpack(message.content))), reply_to=message)

    app.train()(relay)
    app.query()(relay)
    return app


def silo_service(context: Context) -> Handler:
    """Reaches the silo service at the SuperNode's ``silo-address``, for instance ``unix:/run/silo.sock``."""
    address = str(context.node_config["silo-address"])

    def handle(body: bytes) -> bytes:
        options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        with grpc.insecure_channel(address, options=options) as channel:
            reply = silo_pb2_grpc.SiloStub(channel).Handle(pb.Envelope(body=body), wait_for_ready=True, timeout=3600)
            return bytes(reply.body)

    return handle
