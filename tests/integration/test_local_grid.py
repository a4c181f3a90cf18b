"""The local grid by itself: who stays warm, what a process that dies takes with it, what a step's messages share."""

import os
import pickle
import time
from functools import partial
from typing import ClassVar

import pytest
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from configs.errors import InputError
from configs.events import EventLog, read_events
from configs.load import load
from configs.storage.manifests import Manifest, commit_manifest
from federated.coordinator.parties import Parties
from federated.coordinator.rounds import Coordinator
from federated.coordinator.schedule.mail import TRAIN
from federated.simulation import local_grid
from federated.simulation.local_grid import _CALL_BYTES, _CALL_S, LocalGrid, SiloHost
from federated.transport.flower_messages import SHARED, pack, unpack
from privacy.signing import Signer


class Opened:
    """A silo that tells of its opening and closing."""

    did: ClassVar[list[str]] = []

    def __init__(self, name):
        self.name = name
        self.did.append(f"open {name}")

    def handle(self, content):
        return content + self.name.encode()

    def close(self):
        self.did.append(f"close {self.name}")


def test_few_silos_stay_open_and_the_least_recently_asked_is_closed():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    host = SiloHost(pickle.dumps(Opened), threads=1, warm=2)
    for silo in ("a", "b", "a", "c", "a", "b"):
        (reply,), _ = host.handle([Message(pack(b"to "), 7, TRAIN)], [silo])
        assert unpack(reply.content) == f"to {silo}".encode()
    assert Opened.did == ["open a", "open b", "close b", "open c", "close c", "open b"]


class Answers:
    """A silo that answers with its name, unless the name says otherwise."""

    def __init__(self, name):
        self.name = name
        if "quick" in name:
            local_grid._CALL_S = 600.0  # of this process: a busy machine makes nothing long of what is quick

    def handle(self, content):
        if "dies" in self.name:
            os._exit(1)
        if "raises" in self.name:
            raise ValueError(f"no answer from {self.name}")
        if "wrong" in self.name:
            raise InputError("data.private.source: no such file")
        if "slow" in self.name:
            time.sleep(1.5 * _CALL_S)
        return bytes(_CALL_BYTES) if "large" in self.name else self.name.encode()

    def close(self):
        pass


def ask_all(grid, names):
    """What each silo of the grid replies: its bytes, or its error's reason. One reply each."""
    silo_of = dict(zip(grid.get_node_ids(), names, strict=True))
    replies = list(grid.send_and_receive([Message(pack(b"?"), node, TRAIN) for node in silo_of], timeout=120))
    answers = {
        silo_of[reply.metadata.src_node_id]: reply.error.reason if reply.has_error() else unpack(reply.content)
        for reply in replies
    }
    assert len(replies) == len(answers) == len(names)
    return answers


@pytest.mark.parametrize("kind", ["slow", "large"])
def test_a_call_that_holds_too_much_ends_early(kind):
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    silos = [kind, "b", "c"]
    messages = [Message(pack(b"?"), 7, TRAIN) for _ in silos]
    replies, taken = SiloHost(pickle.dumps(Answers), threads=1).handle(messages, silos)
    assert len(replies) == 1
    assert taken >= 1


def test_messages_that_are_short_work_share_calls_and_long_ones_do_not(shared_ray, monkeypatch):
    call, sizes = LocalGrid._call, []

    def record(self, worker, messages):
        sizes.append(len(messages))
        call(self, worker, messages)

    monkeypatch.setattr(LocalGrid, "_call", record)
    for kind, shared in (("quick", True), ("slow", False)):
        names = [f"{kind}{number:02d}" for number in range(24)]
        with LocalGrid(shared_ray, Answers, names, workers=2, threads=1) as grid:
            for _ in range(2):
                ask_all(grid, names)
                sizes.clear()
            assert ask_all(grid, names) == {name: name.encode() for name in names}
        assert sum(sizes) == 24
        assert max(sizes) <= 12  # a part for each worker
        assert (len(sizes) < 24) is shared, sizes


def test_what_ends_processes_or_raises_is_given_up_alone(shared_ray, monkeypatch):
    """Several share each call, with what ends the process, raises, or takes so long that the others wait again.

    What is asked alone then has a process to itself. Behind an answer that was just given, the end of the process by
    the next call loses that answer now and then, and the wrong silo would be given up.
    """
    call, beside = LocalGrid._call, []

    def record(self, worker, messages):
        call(self, worker, messages)
        if not self._alone.isdisjoint(worker.message_ids()):
            beside.append(len(worker.message_ids()))

    monkeypatch.setattr(LocalGrid, "_call", record)
    names = [f"silo{number:02d}" for number in range(24)]
    names[3], names[8], names[14], names[15] = "silo03-dies", "silo08-raises", "silo14-slow", "silo15-dies"
    with LocalGrid(shared_ray, Answers, names, workers=2, threads=1) as grid:
        grid._fit[TRAIN] = 6.0
        answers = ask_all(grid, names)
    given_up = {name for name, answer in answers.items() if isinstance(answer, str)}
    assert given_up == {"silo03-dies", "silo08-raises", "silo15-dies"}
    assert answers["silo08-raises"] == "no answer from silo08-raises"
    assert all(answers[name] == name.encode() for name in names if name not in given_up)
    assert len(beside) > 3
    assert set(beside) == {1}


def test_a_wrong_setting_of_the_simulation_is_raised(shared_ray):
    names = ["silo00", "silo01-wrong", "silo02"]
    with LocalGrid(shared_ray, Answers, names, workers=1, threads=1) as grid:
        grid._fit[TRAIN] = 3.0
        with pytest.raises(InputError, match=r"data\.private\.source: no such file"):
            ask_all(grid, names)


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


class Counts:
    """A silo that has its process and the number of its requests in memory; one ends the process at its third."""

    def __init__(self, name):
        self.name, self.asked = name, 0

    def handle(self, content):
        self.asked += 1
        if "dies" in self.name and self.asked == 3:
            os._exit(1)
        return f"{os.getpid()} {self.asked}".encode()

    def close(self):
        pass


def test_silos_that_are_kept_stay_in_one_process_and_find_another_when_it_dies(warm_ray):
    names = [f"silo{number}" for number in range(7)] + ["silo7-dies"]
    with LocalGrid(warm_ray, Counts, names, workers=2, threads=1, kept=True) as grid:
        steps = [{name: answer.split() for name, answer in ask_all(grid, names).items()} for _ in range(2)]
        assert [{int(count) for _, count in step.values()} for step in steps] == [{1}, {2}]
        home = {name: process for name, (process, _) in steps[0].items()}
        assert {name: process for name, (process, _) in steps[1].items()} == home
        assert len(set(home.values())) == 2
        third = ask_all(grid, names)  # the one that dies is asked again alone, in the process that has come for it
        others = {name: answer.split() for name, answer in third.items() if name != "silo7-dies"}
        dead = home["silo7-dies"]
        for name, (process, count) in others.items():
            if home[name] != dead:
                assert (process, int(count)) == (home[name], 3)
            else:
                assert (process, int(count)) == (dead, 3) or process != dead
        again = {name: answer.split() for name, answer in ask_all(grid, names).items()}
        assert dead not in {process for process, _ in again.values()}
