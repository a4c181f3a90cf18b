"""The local grid by itself: who stays warm, what a process that dies takes with it, what a step's messages share."""

import os
from functools import partial

from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from configs.artifacts import Manifest, commit_manifest
from configs.events import EventLog, read_events
from configs.load import load
from federated.client_app import SHARED, pack, unpack
from federated.exchange import TRAIN, Parties
from federated.local_grid import LocalGrid, SiloHost
from federated.rounds import Coordinator
from privacy.signing import Signer


def test_few_silos_stay_open_and_the_least_recently_asked_is_closed():
    did = []

    class Opened:
        def __init__(self, name):
            self.name = name
            did.append(f"open {name}")

        def handle(self, content):
            return content + self.name.encode()

        def close(self):
            did.append(f"close {self.name}")

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    host = SiloHost(Opened, threads=1, warm=2)
    for silo in ("a", "b", "a", "c", "a", "b"):
        reply = host.handle(Message(pack(b"to "), 7, TRAIN), silo)
        assert unpack(reply.content) == f"to {silo}".encode()
    assert did == ["open a", "open b", "close b", "open c", "close c", "open b"]


def test_a_message_that_ends_processes_is_given_up_alone(shared_ray):
    class Opened:
        def __init__(self, name):
            self.name = name

        def handle(self, content):
            if self.name == "silo03":
                os._exit(1)
            return self.name.encode()

        def close(self):
            pass

    names = [f"silo{number:02d}" for number in range(12)]
    with LocalGrid(shared_ray, Opened, names, workers=2, threads=1) as grid:
        silo_of = dict(zip(grid.get_node_ids(), names, strict=True))
        for _ in range(2):  # the process that took its place is as good
            replies = list(grid.send_and_receive([Message(pack(b"?"), node, TRAIN) for node in silo_of], timeout=120))
            answers = {reply.metadata.src_node_id: reply for reply in replies}
            assert {silo_of[node] for node, reply in answers.items() if reply.has_error()} == {"silo03"}
            assert {node: unpack(reply.content).decode() for node, reply in answers.items() if reply.has_content()} == {
                node: name for node, name in silo_of.items() if name != "silo03"
            }
            assert len(replies) == len(names)


def test_a_steps_messages_hold_the_adapter_once(shared_ray, tmp_path, monkeypatch):
    import server_memory
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(server_memory)  # the processes don't have benchmarks/ on their path
    base, push, contents = tmp_path / "model", LocalGrid.push_messages, []
    base.mkdir()
    commit_manifest(base, Manifest("model", ""))

    def record(self, messages):
        contents.extend(message.content for message in messages if message.metadata.message_type == TRAIN)
        return push(self, messages)

    monkeypatch.setattr(LocalGrid, "push_messages", record)
    config = load("tiny", ["federated.rounds=1", "federated.lora_rank=4", "privacy.epsilon=1"])
    parties, log = Parties(Signer(tmp_path / "coordinator.key"), 3), EventLog(tmp_path / "events.jsonl", ())
    with LocalGrid(shared_ray, partial(server_memory.Echo, tmp_path), ["a", "b", "c"], workers=2, threads=1) as grid:
        Coordinator(grid, config, base, tmp_path / "federation", parties, log, certify=False).run(server_memory.adapter)
    assert len(contents) == 3
    assert len({id(content[SHARED]["content"]) for content in contents}) == 1
    assert all(len(unpack(content)) > 4 * 2**20 for content in contents)
    (event,) = [event for event in read_events(tmp_path / "events.jsonl") if event["event"] == "round"]
    assert event["answered"] == ["a", "b", "c"]
