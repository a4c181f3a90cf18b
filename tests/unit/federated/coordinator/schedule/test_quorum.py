"""Which silos a round needs, how many are enough, and how long each is waited for."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from signed_silos import InProcess, SignedSilo, adapter, coordinator

from configs.errors import InputError, PolicyRefusal, SiloweaveError
from configs.events import read_events
from federated.coordinator import round_commits as commits
from federated.coordinator.schedule import mail, quorum
from federated.protocol import silo_pb2 as pb
from federated.transport.flower_messages import unpack


class Paced(InProcess):
    """A grid that gives one reply at a time, in the order of the silos' names, and keeps those of ``slow`` silos."""

    def __init__(self, silos):
        super().__init__(silos)
        self.slow, self.away, self.bodies, self.seconds = set(), set(), {}, 0

    def get_node_ids(self):
        return [node for node, silo in self.silos.items() if silo.name not in self.away]

    def push_messages(self, messages):
        messages = list(messages)
        for message in messages:
            body = pb.Envelope.FromString(unpack(message.content)).body
            request = pb.Request.FromString(body)
            self.bodies.setdefault((request.silo_id, request.request_id), []).append(body)
        return super().push_messages(messages)

    def pull_messages(self, message_ids):
        def kept(one):
            is_train = self._asked[one].metadata.message_type == "train"
            return is_train and self.silos[self._asked[one].metadata.dst_node_id].name in self.slow

        there = [one for one in message_ids if one in self._asked and not kept(one)]
        if not there:
            self.seconds += 1
        return super().pull_messages(there[:1])

    def asked(self, name):
        """The rounds that a silo was asked to train."""
        return [request for silo, request in self.bodies if silo == name and request.startswith("round-")]


@pytest.fixture
def grid(monkeypatch):
    """Three silos. The clock moves by a second whenever nothing comes."""
    found = Paced([SignedSilo(name) for name in ("a", "b", "c")])
    clock = SimpleNamespace(monotonic=lambda: float(found.seconds), sleep=lambda _: None)
    monkeypatch.setattr(mail, "time", clock)
    monkeypatch.setattr(quorum, "time", clock)
    return found


def events(tmp_path, kind):
    return [event for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == kind]


def committed(tmp_path):
    return [found.round_number for found in commits.all_rounds(tmp_path / "run")]


def spoilt(_, reply, request):
    return b"no reply" if request.HasField("train") else reply


def test_a_round_without_a_required_silo_does_not_count_and_is_asked_again_with_the_same_bytes(grid, tmp_path):
    grid.silos[1].change = spoilt
    settings = ('federated.required_silos=["a"]', "federated.rounds=1")
    with pytest.raises(SiloweaveError, match=r"step 1: 2 of 3 silos answered, without a, and federated.required_silos"):
        coordinator(grid, tmp_path, *settings).run(adapter)
    assert committed(tmp_path) == [0]
    grid.silos[1].change = None
    coordinator(grid, tmp_path, *settings).run(adapter)
    assert committed(tmp_path) == [0, 1]
    assert [len(set(bodies)) for (_, request), bodies in grid.bodies.items() if request == "round-1"] == [1, 1, 1]
    assert events(tmp_path, "round")[-1]["answered"] == ["a", "b", "c"]


def test_a_required_silo_that_is_away_is_waited_for_before_others_work_for_nothing(grid, tmp_path):
    grid.away = {"a"}
    settings = ('federated.required_silos=["a"]', "federated.round_timeout_s=0.2")
    with pytest.raises(SiloweaveError, match=r"step reserve: 2 of 2 silos answered, without a, and federated"):
        coordinator(grid, tmp_path, *settings, silos=2).run(adapter)
    assert not grid.asked("b") and not grid.asked("c")
    # Whether one is required changes nothing that a round's result depends on: whoever leads may give it up.
    coordinator(grid, tmp_path, *settings[1:], silos=2).run(adapter)
    assert committed(tmp_path) == [0, 1, 2]


def test_the_refusal_of_a_required_silo_is_the_runs_own(grid, tmp_path):
    """Whoever else refused, and earlier: the run would go on without that one."""

    def refuses(rule, message):
        def change(_, reply, request):
            if request.HasField("train"):
                reply.refusal.CopyFrom(pb.Refusal(rule=rule, asked="2", allowed="1", message=message))
            return reply

        return change

    grid.silos[1].change = refuses("max_lora_rank", "too large")
    grid.silos[3].change = refuses("max_rounds", "too many rounds")
    with pytest.raises(PolicyRefusal, match=r"without c, and .*required_silos .* c refuses: too many rounds") as caught:
        coordinator(grid, tmp_path, 'federated.required_silos=["c"]', "federated.min_silos=1").run(adapter)
    assert caught.value.rule == "max_rounds"


def answered_by(grid, tmp_path, *settings):
    one = coordinator(grid, tmp_path, *settings)
    one._meet(3, 0)
    grid.seconds = 0
    _, answered = one._round(1, adapter())
    return answered


def test_enough_replies_end_a_round_once_the_required_silos_are_among_them(grid, tmp_path):
    assert answered_by(grid, tmp_path / "1", "federated.enough_silos=1") == ["a"]
    settings = ("federated.enough_silos=1", 'federated.required_silos=["b"]')
    assert answered_by(grid, tmp_path / "2", *settings) == ["a", "b"]


def test_others_have_a_grace_period_once_enough_have_answered(grid, tmp_path):
    grid.slow = {"c"}
    settings = ("federated.enough_silos=1", "federated.grace_s=4", "federated.round_timeout_s=1000")
    assert answered_by(grid, tmp_path, *settings) == ["a", "b"]
    assert grid.seconds == 4
    assert not events(tmp_path, "timeout")  # it is late by nobody's clock


def test_a_silo_has_a_deadline_of_its_own_and_what_it_spends_later_stays_charged(grid, tmp_path):
    grid.slow = {"b", "c"}
    settings = ("federated.deadlines_s={b=3, c=7}", "federated.round_timeout_s=1000")
    assert answered_by(grid, tmp_path, *settings) == ["a"]
    assert grid.seconds == 7
    found = events(tmp_path, "timeout")
    assert [event["silos"] for event in found] == [["b"], ["c"]]
    assert "no answer from b in 3 s" in found[0]["message"]
    assert "stays charged, and what comes of it later is not used" in found[0]["message"]


def test_an_update_that_comes_after_its_deadline_is_in_no_round(grid, tmp_path):
    grid.slow = {"c"}
    one = coordinator(grid, tmp_path, "federated.deadlines_s={c=3}", "federated.rounds=2")
    save = commits.save

    def comes_late(directory, digest, commit, *rest):
        grid.slow = set() if commit.round_number else {"c"}  # from here on its late reply lies there, too
        return save(directory, digest, commit, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commits, "save", comes_late)
        one.run(adapter)
    assert [event["answered"] for event in events(tmp_path, "round")] == [["a", "b"], ["a", "b", "c"]]
    assert grid.silos[3].charged == 2 or len(grid.asked("c")) == 2
    assert [set(found.releases) for found in commits.all_rounds(tmp_path / "run")[1:]] == [{"a", "b"}, {"a", "b", "c"}]


@pytest.mark.parametrize("spelling", ["a", " a ", "a\u200b"])
def test_settings_name_a_silo_in_any_spelling(spelling, grid, tmp_path):
    given = coordinator(grid, tmp_path, f'federated.deadlines_s={{"{spelling}"=3}}').config.federated
    assert (given.deadline_s("a"), given.deadline_s("b")) == (3, given.round_timeout_s)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('federated.required_silos=["d"]', r"federated.required_silos has \['d'\]: none of the 3 silos \(a, b, c\)"),
        ("federated.deadlines_s={a=3, e=4}", r"federated.deadlines_s has \['e'\]: none of the 3 silos"),
    ],
)
def test_a_name_that_no_silo_has_is_refused_at_once(setting, message, grid, tmp_path):
    given = coordinator(grid, tmp_path, setting).config.federated
    with pytest.raises(InputError, match=message):
        quorum.check_names(given, ["c", "b", "a"])
    one = coordinator(grid, tmp_path)
    roster = {silo.name: silo.signer.public_key for silo in grid.silos.values()}
    with pytest.raises(InputError, match=message):
        replace(one.exchange, parties=replace(one.parties, roster=lambda: roster), settings=given, receipt_of=bytes)
