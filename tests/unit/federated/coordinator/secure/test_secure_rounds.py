"""Rounds whose updates are added up under masks: what they give, who may be gone, and what nobody learns."""

import itertools
import json
import os
import time

import numpy as np
import pytest
from masked_silos import MaskedGrid, MaskedSilo
from model_parts import FILES
from signed_silos import InProcess, SignedSilo, adapter, coordinator

from configs.errors import InputError, PolicyRefusal, SiloweaveError
from configs.events import read_events
from configs.load import load
from configs.schema.federated import FederatedSettings
from configs.storage.layout import SECURE_SUM
from federated.adapters.arrays import from_bytes, to_bytes
from federated.coordinator import round_commits as commits
from federated.coordinator.secure import sum_record
from federated.coordinator.secure.masked_sum import MaskedSum
from federated.coordinator.secure.secure_rounds import check_silos
from federated.protocol import silo_pb2 as pb
from privacy.certificate.check import check_certificate
from privacy.secagg.messages import Phase

SECURE = "federated.secure_aggregation=true"
NAMES = ("a", "b", "c", "d", "e")
STEPS = ("train", "phase 2", "phase 3", "phase 4", "phase 5")


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """The coordinator is killed here, and never its machine: what it has written is there."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def values_of(names=NAMES):
    return {name: (number + 1) ** 2 / 1000 for number, name in enumerate(names)}


def mean_of(names=NAMES):
    return pytest.approx(np.mean([values_of()[name] for name in names]), abs=1e-6)


def silos_of(names=NAMES, kind=MaskedSilo):
    return [kind(name, value=value) for name, value in values_of(names).items()]


def events(folder, kind):
    return [event for event in read_events(folder / "run" / "events.jsonl") if event["event"] == kind]


def models(folder):
    return {found.round_number: from_bytes(found.adapter) for found in commits.all_rounds(folder / "run")}


def secure(silos, folder, *overrides):
    return coordinator(MaskedGrid(silos), folder, SECURE, *overrides)


def run(silos, folder, *overrides):
    one = secure(silos, folder, *overrides)
    one.run(adapter)
    return one


def moved(folder, number=1):
    """By how much a round has moved the model's values, which all silos move alike."""
    before, after = models(folder)[number - 1], models(folder)[number]
    return np.concatenate([(after[name] - before[name]).reshape(-1) for name in after])


@pytest.mark.parametrize("aggregation", ["fedavg", "fedavgm", "fedadam", "fedyogi"])
def test_a_round_is_that_of_the_plain_mean_up_to_the_stated_error(aggregation, tmp_path):
    rule = f"federated.aggregation={aggregation}"
    plain = coordinator(InProcess(silos_of(kind=SignedSilo)), tmp_path / "plain", rule)
    plain.run(adapter)
    one = run(silos_of(), tmp_path / "secure", rule)
    told = events(tmp_path / "secure", "secure_sum")
    assert [event["summed"] for event in told] == [list(NAMES)] * 2
    assert told[0]["error_bound"] < 1e-9
    for number, found in models(tmp_path / "secure").items():
        for name, array in found.items():
            # Float32's own rounding, and in the adaptive ones the root of what it makes of a tiny difference.
            np.testing.assert_allclose(array, models(tmp_path / "plain")[number][name], rtol=0, atol=4e-7)
    check_certificate(one.certify_model(FILES), "test")


def test_commits_and_events_hold_no_update(tmp_path):
    silos = silos_of()
    run(silos, tmp_path)
    single = [to_bytes(silo.update()) for silo in silos]
    single += [np.full(3, silo.value, np.float32).tobytes() for silo in silos]
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 5 and not any(one in content for one in single for content in written)


def test_what_is_shown_of_an_update_differs_from_it_and_from_try_to_try(tmp_path):
    """The same values under other masks: nothing but chance is common to them."""
    seen = []
    for folder in ("one", "two"):
        silos = silos_of()
        grid, masked = MaskedGrid(silos), {}

        def message_of(content, asked, kept=masked, make=grid.message_of):
            reply = pb.Reply.FromString(pb.Envelope.FromString(content).body)
            if reply.WhichOneof("kind") == "aggregated":
                kept[reply.silo_id, len(kept)] = reply.aggregated.message
            return make(content, asked)

        grid.message_of = message_of
        coordinator(grid, tmp_path / folder, SECURE, "federated.rounds=1").run(adapter)
        seen.append(masked)
    words = [{silo: message for (silo, _), message in sorted(one.items(), key=lambda e: len(e[1]))} for one in seen]
    for silo in NAMES:
        assert words[0][silo] != words[1][silo]
    assert moved(tmp_path / "one").mean() == mean_of()


@pytest.mark.parametrize("step", STEPS)
def test_a_silo_may_be_gone_from_any_phase_on(step, tmp_path):
    silos = silos_of()
    silos[2].gone = set(STEPS[STEPS.index(step) :])
    one = run(silos, tmp_path, "federated.rounds=1")
    left = [name for name in NAMES if name != "c"] if step in STEPS[:3] else list(NAMES)
    assert moved(tmp_path).mean() == mean_of(left)
    (told,) = events(tmp_path, "secure_sum")
    assert told["summed"] == left
    assert told["dropped"] == (["c"] if step in ("phase 2", "phase 3") else [])
    document = one.certify_model(FILES)
    check_certificate(document, "test")
    assert sorted(document["model"]["rounds"][0]["releases"]) == left


@pytest.mark.parametrize("step", STEPS[1:])
def test_with_too_few_left_nothing_is_unmasked_and_the_same_command_goes_on_with_the_next_round(step, tmp_path):
    silos, number = silos_of(), STEPS.index(step) + 1
    for silo in silos[:3]:
        silo.gone = set(STEPS[STEPS.index(step) :])
    with pytest.raises(SiloweaveError, match=rf"step 1/{Phase(number).name.lower()}: 2 of 5 silos answered, a secure"):
        run(silos, tmp_path, "federated.rounds=2")
    asked = [step for silo in silos for step, _ in silo.asked]
    assert "phase 5" not in asked or step == "phase 5"
    assert sorted(models(tmp_path)) == [0]
    for silo in silos[:3]:  # they were started again, and have lost their clients
        silo.gone = set()
        silo.restart()
    with pytest.raises(SiloweaveError, match="the sum of round 1 is lost: nothing was unmasked, and its charges stay"):
        run(silos, tmp_path, "federated.rounds=2")
    one = run(silos, tmp_path, "federated.rounds=2")
    assert not moved(tmp_path, 1).any() and moved(tmp_path, 2).mean() == mean_of()
    assert [silo.trained for silo in silos] == [[1, 2]] * 5
    document = one.certify_model(FILES)
    check_certificate(document, "test")
    assert document["model"]["rounds"][0]["releases"] == {}
    assert [event["round"] for event in events(tmp_path, "lost")] == [1]


def test_silos_that_were_only_late_are_asked_again(tmp_path):
    silos = silos_of()
    for silo in silos[:3]:
        silo.gone = {"phase 3"}
    with pytest.raises(SiloweaveError, match="run the same command again"):
        run(silos, tmp_path, "federated.rounds=1")
    for silo in silos:
        silo.gone = set()
    run(silos, tmp_path, "federated.rounds=1")
    assert moved(tmp_path).mean() == mean_of()
    assert [silo.trained for silo in silos] == [[1]] * 5


class Killed(BaseException):
    """What no handler of the coordinator's catches: as a kill."""


def points(patch, kill_at):
    """Counts what the coordinator does to its disk and its silos, and dies before one of these."""
    count = itertools.count()

    def dying(what):
        def inner(*arguments, **values):
            if next(count) == kill_at:
                raise Killed
            return what(*arguments, **values)

        return inner

    for where, name in (
        (sum_record, "write_atomic"),
        (commits, "save"),
        (MaskedGrid, "push_messages"),
        (MaskedGrid, "pull_messages"),
    ):
        patch.setattr(where, name, dying(getattr(where, name)))


def test_a_coordinator_that_is_killed_anywhere_is_told_the_same_sum(tmp_path):
    names, rounds = NAMES[:3], "federated.rounds=2"
    for kill_at in itertools.count():
        silos, folder, died = silos_of(names), tmp_path / str(kill_at), False
        with pytest.MonkeyPatch.context() as patch:
            points(patch, kill_at)
            try:
                run(silos, folder, rounds)
            except Killed:
                died = True
        one = run(silos, folder, rounds)
        for number in (1, 2):
            assert moved(folder, number).mean() == mean_of(names), kill_at
        assert [silo.trained for silo in silos] == [[1, 2]] * 3
        for silo in silos:  # whatever was asked again had the same bytes
            steps = [step for step, digest in sorted(set(silo.asked)) if step.startswith(("train", "phase"))]
            assert [steps.count(step) for step in STEPS] == [2] * 5
        assert not events(folder, "refused") and not events(folder, "rejected")
        check_certificate(one.certify_model(FILES), "test")
        if not died:
            break
    assert kill_at > 30


def test_a_later_restart_does_not_take_in_who_was_not_there(tmp_path):
    """A silo that comes after others were told who is there would make another message of the same phase."""
    silos = silos_of()
    silos[4].gone = {"train"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskedSum, "next", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(silos, tmp_path, "federated.rounds=1")
    silos[4].gone = set()
    run(silos, tmp_path, "federated.rounds=1")
    assert events(tmp_path, "secure_sum")[0]["summed"] == list(NAMES[:4])
    assert silos[4].trained == []


def test_a_damaged_commit_of_a_round_that_silos_are_past_is_not_made_again(tmp_path):
    silos = silos_of()
    with pytest.MonkeyPatch.context() as patch:
        save = commits.save

        def dies(directory, digest, commit, *rest):
            if commit.round_number == 2:
                raise Killed
            return save(directory, digest, commit, *rest)

        patch.setattr(commits, "save", dies)
        with pytest.raises(Killed):
            run(silos, tmp_path)
    (tmp_path / "run" / "round-00001" / "adapter.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="is of round 0, and round 2 was added up under masks, which silos do once"):
        run(silos, tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"round": 1}', b'{"round": 1, "answered": {"9": []}, "lost": ""}'])
def test_a_damaged_record_is_named(content, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / SECURE_SUM).write_bytes(content)
    with pytest.raises(InputError, match=r"secure-sum\.json: (damaged|not JSON|.*expected)"):
        secure(silos_of(), tmp_path)


@pytest.mark.parametrize("field", ["adapter", "learning_rate", "round", "frozen_below", "optimizer"])
def test_two_silos_that_were_asked_for_different_things_are_never_added_up(field, tmp_path, monkeypatch):
    """One of three is told something else; its keys are of another sum, and two are too few with one colluder."""
    silos = silos_of(NAMES[:3])
    one = secure(silos, tmp_path, "federated.rounds=2", "federated.colluders=1")
    body = one.exchange.body

    def other(request_id, silo="", **kind):
        if silo == "b" and "train" in kind:
            train = pb.Train.FromString(kind["train"].SerializeToString())
            given = getattr(train, field)
            content = to_bytes({name: array + 1 for name, array in adapter().items()})
            setattr(train, field, {bytes: content, float: 0.0, str: "sgd"}.get(type(given)) or 2 * (type(given) is int))
            kind = {"train": train}
        return body(request_id, silo, **kind)

    monkeypatch.setattr(one.exchange, "body", other)
    with pytest.raises(SiloweaveError, match="2 of 3 silos answered, a secure sum takes 3"):
        one.run(adapter)
    assert [step for silo in silos for step, _ in silo.asked if step.startswith("phase")] == []
    (told,) = events(tmp_path, "rejected")
    assert told["silo"] == "b" and "another round, model, adapter, plan, roster" in told["message"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda roster: {**roster, "z": "00" * 32}, "z not confirmed here"),
        (lambda roster: {**roster, "c": "00" * 32}, "c with another key"),
        (lambda roster: {name: key for name, key in roster.items() if name != "c"}, "c confirmed here, and not there"),
    ],
)
def test_a_forged_roster_is_refused_before_anything_is_reserved(changed, said, tmp_path, monkeypatch):
    silos = silos_of(NAMES[:3])
    grid = MaskedGrid(silos)
    one = coordinator(grid, tmp_path, SECURE)
    exchange = one.exchange
    monkeypatch.setattr(exchange, "enrolled", lambda: changed(type(exchange).enrolled(exchange)))
    with pytest.raises(PolicyRefusal, match=f"what this silo's steward has confirmed: {said}"):
        one.run(adapter)
    assert not any(silo.trained for silo in silos)


def test_a_run_that_does_not_offer_what_a_policy_requires_ends_with_status_3_before_anything_is_reserved(tmp_path):
    silos = silos_of(NAMES[:3])
    for silo in silos:
        silo.policy = silo.policy.model_copy(update={"secure_aggregation": "required"})
    with pytest.raises(PolicyRefusal, match="allowed a run with secure aggregation alone") as refused:
        coordinator(MaskedGrid(silos), tmp_path / "plain").run(adapter)
    assert refused.value.exit_status == 3 and not any(silo.trained for silo in silos)
    run(silos, tmp_path / "secure", "federated.rounds=1")
    for silo in silos:
        silo.policy = silo.policy.model_copy(update={"min_colluders": 1})
    with pytest.raises(PolicyRefusal, match="min_colluders: asked 0, allowed 1"):
        run(silos, tmp_path / "few")


def test_a_silo_cannot_pass_off_another_ones_message(tmp_path):
    """It sends what the first silo has signed: its own is missing then, and nobody else's."""
    stolen = {}

    def steals(silo, reply, request):
        if request.WhichOneof("kind") == "train":
            if silo.name == "a":
                stolen["keys"] = reply.trained.keys
            else:
                reply.trained.keys = stolen["keys"]
        return reply

    silos = [MaskedSilo(name, steals if name in "ac" else None, value) for name, value in values_of().items()]
    run(silos, tmp_path, "federated.rounds=1")
    assert events(tmp_path, "secure_sum")[0]["summed"] == ["a", "b", "d", "e"]
    assert "its message is of silo 'a'" in events(tmp_path, "rejected")[0]["message"]


def test_a_silo_of_an_earlier_version_is_named_with_the_setting(tmp_path):
    class Earlier(MaskedSilo):
        def answer(self, request, reply):
            if request.version not in (3, 4):
                reply.refusal.rule = "version"
                reply.refusal.message = f"version: asked {request.version}, allowed 3 or 4"
                return
            super().answer(request, reply)

    with pytest.raises(PolicyRefusal, match=r"asked 6, allowed 3 or 4; federated\.secure_aggregation is true: have"):
        run([Earlier(name) for name in NAMES[:3]], tmp_path / "all")
    mixed = [*silos_of(NAMES[:3]), Earlier("d")]
    for silo in mixed[:3]:
        silo.roster = {other.name: other.signer.public_key for other in mixed[:3]}
    run(mixed, tmp_path / "one", "federated.rounds=1")
    assert events(tmp_path / "one", "secure_sum")[0]["summed"] == list(NAMES[:3])


def test_what_a_silo_is_asked_without_secure_aggregation_says_nothing_of_it(tmp_path):
    silos = silos_of(NAMES[:3], SignedSilo)
    one = coordinator(InProcess(silos), tmp_path)
    one.run(adapter)
    assert one.secure is None and not (tmp_path / "run" / SECURE_SUM).exists()
    assert "secure_sum" not in json.loads(one.plan.model_dump_json())


@pytest.mark.parametrize(
    ("settings", "silos", "said"),
    [
        ((), 2, ""),
        ((), 1, "a sum takes 2 silos, and there are 1"),
        (("federated.colluders=1",), 2, "with federated.colluders 1 and federated.min_silos 1 a sum takes 3 silos"),
        (("federated.min_silos=4",), 3, "federated.min_silos 4 a sum takes 4 silos, and there are 3"),
        (("federated.enough_silos=2",), 5, r"federated\.enough_silos is 2: a secure sum of 5 silos takes 3"),
        (("federated.enough_silos=3",), 5, ""),
    ],
)
def test_silos_that_are_too_few_are_told_before_anybody_is_asked(settings, silos, said):
    config = load("tiny", [SECURE, *settings])
    if not said:
        check_silos(config, silos)
        return
    with pytest.raises(InputError, match=said):
        check_silos(config, silos)


@pytest.mark.parametrize(("own_time", "patience_s"), [(False, 60.0), (True, 600.0)])
def test_with_clients_as_units_nobodys_slowness_shortens_the_time_of_others(own_time, patience_s):
    """Else one client's speed would decide whether another one is in the sum, and the first would move it by 2 C."""
    settings = FederatedSettings(round_timeout_s=600.0)
    one = MaskedSum(None, settings, None, None, None, time.monotonic() - 590, own_time=own_time)
    assert one._patience_s() == patience_s
