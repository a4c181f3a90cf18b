"""The Flower ClientApp: a thin relay between Flower's messages and a silo. Imports neither torch nor any data."""

from collections.abc import Callable

import grpc
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from federated import silo_pb2 as pb
from federated import silo_pb2_grpc
from federated.protocol import MAX_MESSAGE_BYTES

RECORD, BODY, RECEIPT = "siloweave", "body", "receipt"

Handler = Callable[[bytes, bytes], bytes]
Connect = Callable[[Context], Handler]


def pack(body: bytes, receipt: bytes = b"") -> RecordDict:
    """A request's or reply's bytes as a Flower message's content; beside a request, the silo's last receipt."""
    return RecordDict({RECORD: ConfigRecord({BODY: body, RECEIPT: receipt})})


def unpack(content: RecordDict) -> tuple[bytes, bytes]:
    """The bytes that ``pack`` put in.

    Raises:
        ValueError: the content was not made by ``pack``.
    """
    record = content.get(RECORD)
    body, receipt = (record.get(BODY), record.get(RECEIPT)) if isinstance(record, ConfigRecord) else (None, None)
    if not isinstance(body, bytes) or not isinstance(receipt, bytes):
        raise ValueError("the message holds no siloweave body and receipt")
    return body, receipt


def make_app(connect: Connect) -> ClientApp:
    """A ClientApp that hands every message to the silo that ``connect`` finds for its context."""
    app = ClientApp()

    def relay(message: Message, context: Context) -> Message:
        return Message(pack(connect(context)(*unpack(message.content))), reply_to=message)

    app.train()(relay)
    app.query()(relay)
    return app


def silo_service(context: Context) -> Handler:
    """Reaches the silo service at the SuperNode's ``silo-address``, for instance ``unix:/run/silo.sock``."""
    address = str(context.node_config["silo-address"])

    def handle(body: bytes, receipt: bytes) -> bytes:
        options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        with grpc.insecure_channel(address, options=options) as channel:
            envelope = pb.Envelope(body=body, receipt=receipt)
            reply = silo_pb2_grpc.SiloStub(channel).Handle(envelope, wait_for_ready=True, timeout=3600)
            return bytes(reply.body)

    return handle
