"""A line that is cut, and a relay that is killed, between the real SuperLink and the real node: what travels twice."""

import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import pytest
from cut_line import CutLine
from flower_link import FlowerLink
from flwr.app import Message

from federated.coordinator.flower_grid import OneByOne
from federated.protocol import silo_pb2 as pb
from federated.transport.flower_messages import PIECE_BYTES, pack, unpack
from federated.transport.service import serve

SIZE, WAITS_S = 6 * PIECE_BYTES, 60


class Echo:
    """A silo that answers a request with its bytes the other way round; a spend is a body that was not seen before."""

    def __init__(self):
        self.spends, self.held = set(), threading.Event()
        self.held.set()

    def handle(self, envelope):
        body = pb.Envelope.FromString(envelope).body
        self.spends.add(body)
        self.held.wait(WAITS_S)
        reply = pb.Reply(silo_id="a", trained=pb.Trained(update=body[::-1]))
        return pb.Envelope(body=reply.SerializeToString()).SerializeToString()


@pytest.fixture
def silo():
    folder, echo = Path(tempfile.mkdtemp(prefix="sw-")), Echo()
    server, _ = serve(echo.handle, 2**30, f"unix:{folder}/s.sock")
    yield echo, f"unix:{folder}/s.sock"
    echo.held.set()
    server.stop(None).wait()
    shutil.rmtree(folder)


@pytest.fixture
def link(silo, tmp_path):
    started = FlowerLink(tmp_path, silo[1])
    yield started
    started.end()


def until(holds, what):
    deadline = time.monotonic() + WAITS_S
    while not (found := holds()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return found


def nodes_of(link, line):
    """The coordinator's grid, once the node is there."""
    link.start_node(line.port)
    nodes = OneByOne(link.grid)
    until(lambda: list(nodes.get_node_ids()), "the node")
    return nodes


def ask(nodes, link, body):
    envelope = pb.Envelope(body=body).SerializeToString()
    content = pack(envelope, body, in_pieces=True)
    return next(iter(nodes.push_messages([Message(content, link.node_id, "train", group_id="1", ttl=WAITS_S)])))


def answer(nodes, name, meanwhile=lambda: None):
    """The update in the reply."""

    def replies():
        meanwhile()
        return list(nodes.pull_messages([name]))

    (reply,) = until(replies, "a reply")
    assert not reply.has_error(), reply.error
    assert not list(nodes.pull_messages([]))  # which also ends what goes on
    return pb.Reply.FromString(pb.Envelope.FromString(unpack(reply.content)).body).trained.update


def test_what_has_come_over_a_line_that_is_cut_is_not_sent_again(silo, link):
    with CutLine(link.port, cut_bytes=3 * PIECE_BYTES + PIECE_BYTES // 3, connects=True) as line:
        link.start_node(link.port, HTTPS_PROXY=f"http://127.0.0.1:{line.port}")
        nodes = OneByOne(link.grid)
        until(lambda: list(nodes.get_node_ids()), "the node")
        before, body = line.moved, os.urandom(SIZE)
        assert answer(nodes, ask(nodes, link, body)) == body[::-1]
        assert line.cuts >= 3  # or nothing was tried
        # Of each cut, two pieces on their way at most: whole messages would never have come through.
        assert line.moved - before < 2 * SIZE + line.cuts * 2 * PIECE_BYTES + PIECE_BYTES
        assert silo[0].spends == {body}


def test_a_relay_that_is_killed_anywhere_takes_up_where_it_was(silo, link):
    """Before: its message was lost with it, so the round went on without the silo, after all of its time."""
    pieces = link.state_dir / "pieces"
    with CutLine(link.port, bytes_per_s=4 * PIECE_BYTES) as line:
        nodes, body = nodes_of(link, line), os.urandom(SIZE)
        echo, before = silo[0], line.moved
        echo.held.clear()

        def restarted():
            link.kill_node()
            link.start_node(line.port)

        def sent(size):
            return lambda: line.moved - before > size

        # On its way to the silo, at the silo, and on its way back.
        points = [lambda: len(list(pieces.glob("?" * 64))) >= 2, lambda: bool(echo.spends), sent(int(1.4 * SIZE))]

        def meanwhile():
            if points and points[0]():
                points.pop(0)
                restarted()
                if len(points) < 2:
                    echo.held.set()

        assert answer(nodes, ask(nodes, link, body), meanwhile) == body[::-1]
        assert not points
        assert line.moved - before < 2 * SIZE + 3 * 2 * PIECE_BYTES + PIECE_BYTES
        assert echo.spends == {body}  # the same request each time: charged once
        until(lambda: not list(pieces.iterdir()), "an empty store")


def test_what_has_come_is_there_still_where_another_run_goes_on(silo, link):
    """As after a SuperLink that died: the coordinator goes on in another run of Flower's, with the same request."""
    with CutLine(link.port, bytes_per_s=4 * PIECE_BYTES) as line:
        nodes, body = nodes_of(link, line), os.urandom(SIZE)
        before = line.moved
        ask(nodes, link, body)
        until(lambda: line.moved - before > SIZE // 2, "half of the request")
        again = OneByOne(link.new_run())
        assert answer(again, ask(again, link, body)) == body[::-1]
        assert line.moved - before < 2 * SIZE + 2 * PIECE_BYTES + PIECE_BYTES
        assert silo[0].spends == {body}


def test_an_older_coordinators_message_comes_whole_and_is_answered_whole(silo, link):
    with CutLine(link.port) as line:
        nodes, body = nodes_of(link, line), os.urandom(2 * PIECE_BYTES)
        old = pack(pb.Envelope(body=body).SerializeToString(), takes_pieces=False)
        (name,) = nodes.push_messages([Message(old, link.node_id, "train", ttl=WAITS_S)])
        (reply,) = until(lambda: list(nodes.pull_messages([name])), "a reply")
        assert set(reply.content) == {"siloweave", "shared"}
        assert len(unpack(reply.content)) > len(body)
