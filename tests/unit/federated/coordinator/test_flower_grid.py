"""What silos hold back, or make too large: an announced reply, its objects, an answer about themselves."""

import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from types import SimpleNamespace

import pytest
from flwr.app import Error, Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedResponse, PullObjectRequest, PullObjectResponse
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import GetNodesResponse, PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid
from signed_silos import InProcess, SignedSilo, adapter, coordinator

from configs.errors import SiloweaveError
from configs.events import read_events
from federated.coordinator import flower_grid as flower_replies
from federated.coordinator import rounds
from federated.coordinator.flower_grid import OneByOne
from federated.coordinator.replies import LARGEST_EXTRA_BYTES
from federated.coordinator.schedule import mail
from federated.transport.flower_messages import pack, sent_before, unpack

HANGS_S = 60  # for as long as a pull is held back from those that wait for it: they should not


class Stalling(InProcess):
    """Its first node announces replies to requests for training, and sends them once a test is over."""

    def __init__(self, silos):
        super().__init__(silos)
        self.over, self.pulled, self.waited_for = Event(), Counter(), []

    def pull_messages(self, message_ids):
        for one in message_ids:
            asked = self._asked.get(one)
            if asked is not None and asked.metadata.dst_node_id == 1 and asked.metadata.message_type == "train":
                self.pulled[asked.metadata.group_id] += 1
                self.waited_for += [] if self.over.wait(HANGS_S) else [one]
        return super().pull_messages(message_ids)


class Counting(OneByOne):
    """Counts the replies that have come."""

    came = 0

    def pull_messages(self, message_ids):
        found = list(super().pull_messages(message_ids))
        self.came += len(found)
        return found


def test_a_reply_that_is_announced_and_never_sent_holds_up_nobody(tmp_path, monkeypatch):
    """Before: the coordinator's only thread waited for it, up to 5,000 s; meanwhile the others' replies expired."""
    monkeypatch.setattr(flower_replies, "_PATIENCE_S", 0.1)
    honest = [f"silo-{number}" for number in range(6)]  # more than are asked at once
    grid = Stalling([SignedSilo(name) for name in ["hostile", *honest]])
    nodes = Counting(grid)
    one = coordinator(nodes, tmp_path, "federated.round_timeout_s=60", silos=7)
    one._meet(7, 0)
    nodes.came, began = 0, time.monotonic()
    # The step's time is up once all who answer have: whatever else this machine does, it is long enough for them.
    clock = SimpleNamespace(monotonic=lambda: began + 60 * (nodes.came == len(honest)), sleep=time.sleep)
    monkeypatch.setattr(mail, "time", clock)
    _, answered = one._round(1, adapter())
    grid.over.set()
    assert not grid.waited_for
    assert answered == honest
    (late,) = [event for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "timeout"]
    assert late["silos"] == ["hostile"]
    assert grid.pulled == {"1": 1}  # however often its reply is asked for


def test_a_small_question_makes_no_reply_too_long_that_outlasts_it():
    """In buffered rounds a silo may still be training when others are asked who they are."""
    nodes = OneByOne(Stalling([SignedSilo("good")]))
    large, small = request(1, "train"), request(1, "query")
    large.content["siloweave"]["head"] = bytes(2**23)
    nodes.push_messages([large])
    nodes.push_messages([small])
    assert nodes._most_bytes > 2**23


def test_a_reply_that_comes_after_its_step_is_dropped(monkeypatch):
    monkeypatch.setattr(flower_replies, "_PATIENCE_S", 0.1)
    grid = Stalling([SignedSilo("late"), SignedSilo("good")])
    nodes = OneByOne(grid)
    late, good = nodes.push_messages([request(1, "train"), request(2, "train")])
    assert [reply.metadata.reply_to_message_id for reply in nodes.pull_messages([late, good])] == [good]
    thread = nodes._pulls[late]
    assert list(nodes.pull_messages([])) == []
    grid.over.set()
    assert thread.done.wait(HANGS_S)
    assert list(nodes.pull_messages([good])) == []


def request(node, kind, size=0):
    return Message(pack(bytes(size)), node, kind, ttl=60)


class SuperLink(ThreadingHTTPServer):
    """What Flower's grid asks of a SuperLink, where one reply was announced. Its last objects may never come."""

    def __init__(self, reply, held_back=0, status=200):
        super().__init__(("127.0.0.1", 0), Answers)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self.objects = {name: found.deflate() for name, found in get_all_nested_objects(reply).items()}
        self.tree, self.reply = get_object_tree(reply), message_to_proto(remove_content_from_message(reply))
        self.held_back = set(sorted(self.objects, key=lambda name: -len(self.objects[name]))[:held_back])
        self.status, self.given_bytes, self.asked_for_more, self.since = status, 0, Event(), "then"


class Answers(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        content = getattr(self, self.path.rsplit("/", 1)[1].replace("-", "_"))(body).SerializeToString()
        self.send_response(200 if self.path.endswith("get-nodes") else self.server.status)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def get_nodes(self, _):
        return GetNodesResponse(nodes=[NodeInfo(node_id=2, last_activated_at=self.server.since)])

    def pull_messages(self, body):
        assert len(PullAppMessagesRequest.FromString(body).message_ids) == 1
        return PullAppMessagesResponse(messages_list=[self.server.reply], message_object_trees=[self.server.tree])

    def pull_object(self, body):
        name = PullObjectRequest.FromString(body).object_id
        if name in self.server.held_back:
            self.server.asked_for_more.set()
            return PullObjectResponse(object_found=True, object_available=False)
        self.server.given_bytes += len(self.server.objects[name])
        content = self.server.objects[name]
        return PullObjectResponse(object_found=True, object_available=True, object_content=content)

    def confirm_message_received(self, _):
        return ConfirmMessageReceivedResponse()

    def log_message(self, *_): ...


@pytest.fixture
def flower():
    """Flower's grid, at a SuperLink that holds this reply to a request of so many bytes."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    started = []

    def start(size, content, **values):
        asked = request(2, "train", size)
        asked.metadata.__dict__["_message_id"] = "asked"
        link = SuperLink(Message(content, reply_to=asked), **values)
        Thread(target=link.serve_forever, daemon=True).start()
        grid = HttpGrid(f"127.0.0.1:{link.server_port}", insecure=True, token="a token")
        grid.set_run(Run.create_empty(1))
        started.append((grid, link))
        grid.push_messages = lambda messages: ["asked" for _ in messages]
        nodes = OneByOne(grid)
        assert nodes.push_messages([asked]) == ["asked"]
        return nodes, link

    yield start
    for grid, link in started:
        grid.close()
        link.shutdown()
        link.server_close()


def whole(nodes):
    """The one reply, when it has come."""
    for _ in range(HANGS_S):
        for reply in nodes.pull_messages(["asked"]):
            return reply
    raise AssertionError("no reply")


def test_a_reply_as_large_as_it_may_be_comes_whole(flower):
    nodes, _ = flower(1000, pack(bytes(LARGEST_EXTRA_BYTES)))
    assert unpack(whole(nodes).content) == bytes(LARGEST_EXTRA_BYTES)


def test_a_reply_is_fetched_no_further_than_it_may_be_long(flower):
    """Before: all of its objects were, and joined, before anything looked at how long it was."""
    content = pack(b"")
    for number in range(20):
        content[f"more {number}"] = pack(number.to_bytes() * 2**20)["siloweave"]
    nodes, link = flower(1000, content)
    most = 1000 + LARGEST_EXTRA_BYTES
    assert whole(nodes).error.reason == f"the reply has more than the {most} bytes that one may have"
    assert link.given_bytes < most + 2**22


def test_what_is_held_back_is_not_asked_for_after_its_step(flower, monkeypatch):
    monkeypatch.setattr(flower_replies, "_PATIENCE_S", 0.1)
    nodes, link = flower(1000, pack(b"reply"), held_back=1)
    assert list(nodes.pull_messages(["asked"])) == []
    assert link.asked_for_more.wait(HANGS_S)
    (pull,) = nodes._pulls.values()
    assert list(nodes.pull_messages([])) == []
    assert pull.done.wait(HANGS_S)  # and not Flower's two hours


def test_a_run_that_flower_has_stopped_ends_with_one_line(flower):
    """Flower says so with an exception that has no words and that nothing of ours knows."""
    nodes, _ = flower(1000, pack(b""), status=403)
    with pytest.raises(SiloweaveError, match="Flower has stopped this run; run the same command again"):
        whole(nodes)


class Silent(InProcess):
    """Its first node comes when a test says so, and never answers one question. Notes for how long that is good."""

    def __init__(self, silos, question):
        super().__init__(silos)
        self.question, self.there, self.ttls = question, False, []

    def get_node_ids(self):
        return [node for node in self.silos if node > 1 or self.there]

    def push_messages(self, messages):
        self.ttls += [message.metadata.ttl for message in messages if message.metadata.group_id == self.question]
        return super().push_messages(messages)

    def pull_messages(self, message_ids):
        found = {name: self._asked[name].metadata for name in message_ids if name in self._asked}
        kept = {name for name, one in found.items() if (one.dst_node_id, one.group_id) == (1, self.question)}
        return super().pull_messages(found.keys() - kept)


@pytest.mark.parametrize("question", ["describe", "reserve"])
def test_a_silo_that_leaves_a_question_open_holds_up_no_round(tmp_path, monkeypatch, question):
    """Before: each round began a whole ``federated.round_timeout_s`` late, whatever ``federated.enough_silos`` said."""
    monkeypatch.setattr(rounds, "LONGEST_QUERY_S", 0.1)
    grid = Silent([SignedSilo("silent"), SignedSilo("a"), SignedSilo("b")], question)
    settings = ("federated.round_timeout_s=30", "federated.min_silos=2", "federated.enough_silos=2")
    one = coordinator(grid, tmp_path, *settings, silos=2)
    one._meet(2, 0)
    grid.there = True
    one._meet(3, 1)
    assert grid.ttls == [30, 30, 0.1]
    assert one.reserved == {"a", "b"}
    (silent,) = [event for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "timeout"]
    assert (silent["step"], silent["missing"]) == (question, 1)
    assert "in 0.1 s" in silent["message"]


def test_no_more_time_is_spent_on_reservations_once_enough_are_there(tmp_path, monkeypatch):
    """Also before the first round, when all are asked at once."""
    monkeypatch.setattr(rounds, "LONGEST_QUERY_S", 0.1)
    grid = Silent([SignedSilo("silent"), SignedSilo("a"), SignedSilo("b")], "reserve")
    grid.there = True
    one = coordinator(grid, tmp_path, "federated.round_timeout_s=30", "federated.min_silos=2")
    one._meet(3, 0)
    assert one.reserved == {"a", "b"}
    (silent,) = [event for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "timeout"]
    assert "no answer from silent in 0.1 s" in silent["message"]


class Restarting:
    """A grid whose node comes anew when a test says so; it has what was sent, and answers what a test likes."""

    def __init__(self):
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.since, self.there, self.sent, self.replies = "first", True, [], []

    def get_node_ids(self):
        return [2] if self.there else []

    def get_nodes(self):
        return [NodeInfo(node_id=2, last_activated_at=self.since)] if self.there else []

    def push_messages(self, messages):
        names = []
        for message in messages:
            names.append(f"id{len(self.sent)}")
            message.metadata.__dict__["_message_id"] = names[-1]
            self.sent.append(message)
        return names

    def answer(self, number, what):
        self.replies.append(Message(what, reply_to=self.sent[number]))

    def pull_messages(self, message_ids):
        found = [reply for reply in self.replies if reply.metadata.reply_to_message_id in message_ids]
        self.replies = [reply for reply in self.replies if reply not in found]
        return found


@pytest.fixture
def restarting(monkeypatch):
    monkeypatch.setattr(flower_replies, "_PATIENCE_S", 0)
    monkeypatch.setattr(OneByOne, "_ended", started)
    grid = Restarting()
    return grid, OneByOne(grid)


def started(nodes, names):
    for name in names:
        pull = flower_replies._Pull(name, nodes._grid, nodes._most_bytes)
        pull._run()
        nodes._pulls[name] = pull
    return True


LOST = Error(ErrorCode.NODE_UNAVAILABLE, "node_unavail")


def test_a_node_that_came_anew_is_sent_the_same_again_and_answers_under_either_id(restarting):
    grid, nodes = restarting
    (name,) = nodes.push_messages([request(2, "train", 10)])
    assert (list(nodes.pull_messages([name])), len(grid.sent)) == ([], 1)
    grid.since = "second"
    assert (list(nodes.pull_messages([name])), len(grid.sent)) == ([], 2)
    first, again = grid.sent
    assert again.content is first.content
    assert sent_before(again.metadata.group_id) == {"id0"}
    assert 0 < again.metadata.ttl <= first.metadata.ttl
    assert (list(nodes.pull_messages([name])), len(grid.sent)) == ([], 2)  # it came anew once
    for number in (1, 0):  # both are answered
        grid.answer(number, pack(b"reply"))
    (reply,) = nodes.pull_messages([name])
    assert (reply.metadata.reply_to_message_id, unpack(reply.content)) == (name, b"reply")
    assert list(nodes.pull_messages([name])) == []


def test_a_message_that_the_superlink_gave_up_is_sent_again_once_its_node_is_back(restarting):
    """Before: a relay that was restarted had lost its silo the round."""
    grid, nodes = restarting
    (name,) = nodes.push_messages([request(2, "train", 10)])
    grid.there = False
    grid.answer(0, LOST)
    assert (list(nodes.pull_messages([name])), len(grid.sent)) == ([], 1)
    grid.there = True
    assert (list(nodes.pull_messages([name])), len(grid.sent)) == ([], 2)
    grid.answer(1, pack(b"reply"))
    (reply,) = nodes.pull_messages([name])
    assert reply.metadata.reply_to_message_id == name


def test_messages_whose_objects_the_superlink_lost_are_sent_anew(restarting, monkeypatch):
    """Before: a SuperLink that was killed while a round was sent ended the run."""
    grid, nodes = restarting
    push, deaths = grid.push_messages, [2]

    def dies(messages):
        names = push(messages)
        if deaths[0]:
            deaths[0] -= 1
            raise ObjectPushError("an object", 1, "a session")
        return names

    monkeypatch.setattr(grid, "push_messages", dies)
    one, other = nodes.push_messages([request(2, "train", 10), request(2, "train", 11)])
    assert (one, other) == ("id4", "id5")
    assert [sent_before(message.metadata.group_id) for message in grid.sent[-2:]] == [{"id0", "id2"}, {"id1", "id3"}]
    assert grid.sent[4].content is grid.sent[0].content
    grid.answer(4, pack(b"reply"))
    grid.answer(1, pack(b"other"))  # one that the node had got all the same
    found = {reply.metadata.reply_to_message_id: unpack(reply.content) for reply in nodes.pull_messages([one, other])}
    assert found == {one: b"reply", other: b"other"}
    deaths[0] = 100
    with pytest.raises(ObjectPushError):
        nodes.push_messages([request(2, "train", 10)])


def test_a_node_that_does_not_come_back_is_not_waited_for_long(restarting, monkeypatch):
    grid, nodes = restarting
    (name,) = nodes.push_messages([request(2, "train", 10)])
    grid.there = False
    grid.answer(0, LOST)
    assert list(nodes.pull_messages([name])) == []
    monkeypatch.setattr(flower_replies, "_RETURNS_S", -1)
    (reply,) = nodes.pull_messages([name])
    assert (reply.error.reason, reply.metadata.reply_to_message_id) == ("node_unavail", name)
    assert len(grid.sent) == 1


def test_a_node_that_comes_anew_for_ever_is_sent_no_more(restarting):
    grid, nodes = restarting
    (name,) = nodes.push_messages([request(2, "train", 10)])
    for number in range(100):
        grid.since = str(number)
        list(nodes.pull_messages([name]))
    assert len(grid.sent) == flower_replies._MOST_TIMES


def test_a_relays_own_error_is_passed_on_at_once(restarting):
    grid, nodes = restarting
    (name,) = nodes.push_messages([request(2, "train", 10)])
    grid.answer(0, Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "its service gave no answer"))
    (reply,) = nodes.pull_messages([name])
    assert reply.error.reason == "its service gave no answer"


def test_a_message_that_the_superlink_does_not_take_again_ends_no_run(restarting, monkeypatch):
    """As where it was removed there while it was being pushed."""
    grid, nodes = restarting
    (name,) = nodes.push_messages([request(2, "train", 10)])

    def push(_):
        raise ObjectPushError("an object", 1, "a session")

    grid.since = "second"
    monkeypatch.setattr(grid, "push_messages", push)
    assert list(nodes.pull_messages([name])) == []
    grid.answer(0, pack(b"reply"))
    (reply,) = nodes.pull_messages([name])
    assert unpack(reply.content) == b"reply"
