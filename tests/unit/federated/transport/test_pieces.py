"""Envelopes in pieces, and a SuperLink that lies about them."""

import logging
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from types import SimpleNamespace

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.identity.x509 import Authority
from federated.transport import fleet, flower_messages
from federated.transport.flower_messages import MOST_PIECES, PIECE_BYTES, again, pack, sent_before, size_bytes, unpack
from federated.transport.node import RelayNode
from federated.transport.node_memory import NodeMemory
from federated.transport.piece_store import PieceStore
from federated.transport.service_client import ask

LONG = bytes(range(256)) * (PIECE_BYTES // 128)  # two pieces, and both alike


@given(st.binary(max_size=40), st.binary(max_size=40), st.binary(max_size=40))
@settings(deadline=None)
def test_an_envelope_in_pieces_arrives_as_it_was(head, shared, tail):
    original = flower_messages.PIECE_BYTES
    flower_messages.PIECE_BYTES = 7
    flower_messages._cut_shared.cache_clear()
    try:
        content = pack(head + shared + tail, shared, in_pieces=True)
        assert unpack(content) == head + shared + tail
        assert size_bytes(content) == len(head + shared + tail)
        assert all(len(one["content"]) <= 7 for name, one in content.items() if name.isdecimal())
    finally:
        flower_messages.PIECE_BYTES = original
        flower_messages._cut_shared.cache_clear()


def test_what_silos_share_is_the_same_objects_for_all_and_what_is_alike_is_one():
    one, other = (pack(silo + LONG + b"tail", LONG, in_pieces=True) for silo in (b"one", b"other"))
    assert [one[name].object_id for name in "12"] == [other[name].object_id for name in "12"]
    assert one["1"] is other["1"]  # and one copy in memory
    assert len({piece.object_id for name, piece in one.items() if name in "12"}) == 1
    assert unpack(one) == b"one" + LONG + b"tail"


@pytest.mark.parametrize(("size", "in_pieces"), [(PIECE_BYTES, True), (2 * PIECE_BYTES, False)])
def test_what_is_short_or_goes_to_an_older_end_is_whole(size, in_pieces):
    assert set(pack(bytes(size), in_pieces=in_pieces)) == {"siloweave", "shared"}


def test_only_an_end_that_says_so_is_sent_pieces():
    assert flower_messages.takes_pieces(pack(b"new"))
    assert not flower_messages.takes_pieces(pack(b"old", takes_pieces=False))


def changed(**values):
    content = pack(LONG, in_pieces=True)
    content["siloweave"] = ConfigRecord({**content["siloweave"], **values})
    return content


def without_one():
    content = pack(LONG, in_pieces=True)
    del content["1"]
    return content


def with_another(piece):
    content = pack(LONG, in_pieces=True)
    content["1"] = ConfigRecord({"content": piece})
    return content


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (changed(pieces=3), "no siloweave envelope"),
        (changed(pieces=1), "their digest is another one"),
        (changed(pieces=MOST_PIECES + 1), "a number of pieces"),
        (changed(pieces=-1), "a number of pieces"),
        (changed(pieces="2"), "a number of pieces"),
        (changed(sha256=b""), "their digest is another one"),
        (changed(tail=b"x"), "their digest is another one"),
        (without_one(), "no siloweave envelope"),
        (with_another("text"), "no siloweave envelope"),
        (with_another(bytes(PIECE_BYTES + 1)), f"more than {PIECE_BYTES} bytes"),
        (with_another(bytes(PIECE_BYTES)), "their digest is another one"),
    ],
)
def test_pieces_that_are_not_what_was_cut_are_refused(content, says):
    with pytest.raises(flower_messages.NoEnvelopeError, match=says):
        unpack(content)


def test_the_ids_of_before_are_no_part_of_the_steps_name():
    names = [sha256(bytes([number])).hexdigest() for number in range(2)]
    assert sent_before(again("round-00003", names)) == set(names)
    assert sent_before("round-00003") == set()


class Answers(BaseHTTPRequestHandler):
    """Answers with the headers that the path says, and sends nothing else: whoever reads on waits."""

    def do_GET(self):
        name, value = self.path[1:].split("=")
        self.send_response(200)
        self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_): ...


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (f"content-length={2**31 + 1}", "no length"),
        ("transfer-encoding=chunked", "no length"),
        ("content-length=-5", "no length"),
    ],
)
def test_an_answer_that_no_message_can_be_is_refused_before_it_is_read(header, says):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        with httpx.Client() as client:
            fleet.bounded(client)
            with pytest.raises((fleet.UnsoundMessageError, httpx.RemoteProtocolError), match=f"{says}|illegal|Length"):
                client.get(f"http://127.0.0.1:{server.server_port}/{header}")
    finally:
        server.shutdown()
        server.server_close()


def tree(names):
    return ObjectTree(object_id="f" * 64, children=[ObjectTree(object_id=name) for name in names])


@pytest.fixture
def node(tmp_path):
    """A node whose SuperLink gives the same bytes whatever it is asked for."""
    authority = Authority(tmp_path / "ca.key", tmp_path / "ca.pem", "test")
    key, memory, ended = ec.generate_private_key(ec.SECP384R1()), NodeMemory(tmp_path / "node.json"), Event()
    one = fleet.Fleet("localhost:1", authority.path.read_bytes(), key, memory, ended)
    content = PullObjectResponse(object_found=True, object_available=True, object_content=LONG)
    one._client = SimpleNamespace(PullObject=lambda _: content, ConfirmMessageReceived=lambda _: None)
    return RelayNode(one, memory, PieceStore(tmp_path / "pieces"), partial(ask, "unix:/none"), ended)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (tree(["a" * 64]), "a piece's bytes are not those that its digest names"),
        (tree(f"{number:064x}" for number in range(MOST_PIECES + 10)), "a message of more than 2056 objects"),
        (tree(["../../etc/passwd"]), "a piece's bytes are not those that its digest names"),
    ],
)
def test_a_message_that_is_not_what_it_says_reaches_no_silo_and_leaves_no_file(node, tmp_path, caplog, found, says):
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    message = Message(pack(b""), 1, "train", ttl=60)
    with caplog.at_level(logging.WARNING, "siloweave.relay"):
        node._serve(message, found)
    assert [record.getMessage().split(": ", 2)[2] for record in caplog.records] == [says]
    assert not list((tmp_path / "pieces").iterdir())
