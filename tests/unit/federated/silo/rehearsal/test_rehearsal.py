"""What a silo says to a rehearsal: nothing of its records, nothing that costs, and not as often as one likes."""

import json
import logging
import shutil
import sys

import pytest
from silo_requests import COORDINATOR, TRUSTED, ask, body_of, opened, signer_of, ward

from configs.storage.files import digest_bytes
from federated.adapters.arrays import to_bytes
from federated.adapters.warm_model import initial_adapter
from federated.protocol import silo_pb2 as pb
from federated.protocol.envelope import seal_request
from federated.protocol.framing import filler
from federated.silo.rehearsal import rehearsal, trial
from federated.silo.silo import Silo
from federated.silo.units import rows_of
from privacy.plan import PlanTerms

PLAN = PlanTerms(sampling_rate=0.05, max_grad_norm=1.0, noise_multiplier=0.8, rounds=2, steps_per_round=2, delta=1e-5)
TIMINGS = ("clock", "seconds")


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """However busy the machine is."""
    monkeypatch.setattr(trial, "TRIAL_S", 400.0)


@pytest.fixture
def silo(tmp_path, tiny_model):
    silo = Silo(ward(tmp_path, tiny_model), TRUSTED)
    yield silo
    silo.close()


@pytest.fixture(scope="module")
def adapter(tiny_run):
    return to_bytes(initial_adapter(tiny_run.config(), tiny_run.model))


def train(silo, adapter, **changes):
    values = {
        "round": 1,
        "plan_digest": PLAN.digest,
        "base_model_digest": silo.workbench.base_model.content_digest,
        "task": "causal",
        "adapter_spec": pb.AdapterSpec(rank=4, alpha=8.0),
        "adapter": adapter,
        "learning_rate": 0.01,
        "optimizer": "adam",
    }
    return pb.Train(**{**values, **changes})


def asked(silo, adapter, plan=PLAN, **more):
    reserve = pb.Reserve(plan=plan.model_dump_json(), request_bytes=len(adapter))
    return {"rehearse": pb.Rehearse(reserve=reserve, train=train(silo, adapter), **more)}


def of_ledger(silo):
    """The bytes of everything that a ledger keeps."""
    path = silo.ledger.path
    kept = [one for name in ("", "-wal") if (one := path.with_name(path.name + name)).exists()]
    anchors = sorted(one for one in path.parent.with_name(f"{path.parent.name}.anchor").rglob("*") if one.is_file())
    return {str(one): one.read_bytes() for one in (*kept, *anchors)}


def without_timings(told):
    for name in TIMINGS:
        told.ClearField(name)
    told.trial.ClearField("prepare_seconds")
    told.trial.ClearField("step_seconds")
    told.trial.ClearField("first_seconds")
    return told.SerializeToString(deterministic=True)


def test_a_rehearsal_charges_nothing_and_reads_no_record(silo, adapter, monkeypatch, tmp_path):
    before, entries = of_ledger(silo), len(silo.ledger.entries())

    def read(_):
        raise AssertionError("the records were read")

    monkeypatch.setattr(silo.workbench, "_examples", read)
    limited = tmp_path / "python"  # as where the service's unit has a limit of its own
    limited.write_text(f'#!/bin/sh\nulimit -d 4000000\nexec {sys.executable} "$@"\n')
    limited.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(limited))
    kinds = (
        {"rehearse": pb.Rehearse()},
        asked(silo, adapter),
        asked(silo, adapter, filler_bytes=1000),
        asked(silo, adapter, PLAN.model_copy(update={"noise_multiplier": 0.1})),
        asked(silo, adapter, trial=True),
    )
    told = [ask(silo, f"rehearsal-{number}", **kind)[0].rehearsed for number, kind in enumerate(kinds)]
    assert told[-1].trial.outcome == "done", told[-1]
    assert [bool(one.refusals) for one in told] == [False, False, False, True, False]
    changed = silo.config.policy.model_copy(update={"budget_epsilon": 0.5})
    silo.config = silo.config.model_copy(update={"policy": changed})
    poorer, _ = ask(silo, "rehearsal-budget", **asked(silo, adapter))
    assert [line.split(":")[0] for line in poorer.rehearsed.refusals] == ["budget_epsilon"]
    assert of_ledger(silo) == before
    assert len(silo.ledger.entries()) == entries


class Done:
    """A process that has taken its steps, and printed more than that."""

    stdout, stderr, returncode = b"noise\n" + json.dumps({"outcome": "done", "records": 3}).encode(), b"", 0


def test_other_records_make_no_other_answer(tmp_path, tiny_model, adapter, monkeypatch):
    """Number, lengths and words of the records change: what is said, and what the process is given that takes steps,
    stays the same byte for byte, but for times and free memory."""
    said, given = [], []
    monkeypatch.setattr(trial.subprocess, "run", lambda *_, **more: given.append(more["input"]) or Done())
    for rows, words in ((60, "note"), (700, "a much longer note about everything that was seen in this ward today")):
        config = ward(tmp_path, tiny_model)
        (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": f"{words} {n}"}) + "\n" for n in range(rows)))
        rows_of.cache_clear()
        silo = Silo(config, TRUSTED)
        assert len(silo.workbench.records) > rows / 2
        reply, _ = ask(silo, "rehearsal", **asked(silo, adapter, trial=True, filler_bytes=500))
        assert (reply.rehearsed.trial.outcome, reply.rehearsed.trial.records) == ("done", 3)
        said.append(without_timings(reply.rehearsed))
        silo.close()
    assert said[0] == said[1]
    settings = [json.loads(content.split(b"\n", 1)[0]) for content in given]
    assert all(one.pop("most_bytes") > 0 for one in settings)
    assert settings[0] == settings[1]
    assert given[0].split(b"\n", 1)[1] == given[1].split(b"\n", 1)[1]
    assert config.data.source.encode() not in given[0]


def test_a_trial_that_takes_too_long_or_fails(silo, adapter, monkeypatch, caplog):
    log = logging.getLogger("trial")
    with monkeypatch.context() as patched:
        patched.setattr(trial, "TRIAL_S", 0.05)
        assert trial.take(silo.config, PLAN, train(silo, adapter), log).outcome == "slow"
    with monkeypatch.context() as patched:
        patched.setattr(trial, "_STEPS", "federated.silo.rehearsal.no_such_steps")
        assert trial.take(silo.config, PLAN, train(silo, adapter), log).outcome == "failed"
    assert "no_such_steps" in caplog.text


def test_what_is_refused_once_the_model_is_there(silo, adapter):
    """By the process that takes the steps: the silo's own model stays as it is, and may not even be loaded."""
    other = train(silo, adapter, adapter_spec=pb.AdapterSpec(rank=8, alpha=8.0))
    reserve = pb.Reserve(plan=PLAN.model_dump_json())
    reply, _ = ask(silo, "rehearsal", rehearse=pb.Rehearse(reserve=reserve, train=other, trial=True))
    (line,) = reply.rehearsed.refusals
    assert line.startswith("adapter: asked other names or shapes, allowed those of the adapter")
    assert not reply.rehearsed.HasField("trial")


def test_what_is_refused_takes_no_steps(silo, adapter, monkeypatch):
    monkeypatch.setattr(rehearsal, "take", lambda *_: pytest.fail("steps were taken"))
    plan = PLAN.model_copy(update={"noise_multiplier": 0.1})
    reply, _ = ask(silo, "rehearsal", **asked(silo, adapter, plan, trial=True))
    assert [line.split(":")[0] for line in reply.rehearsed.refusals] == ["min_noise_multiplier"]
    assert not reply.rehearsed.HasField("trial")


def test_a_reply_is_no_longer_than_its_request_and_says_nothing_by_its_filler(silo, adapter):
    reply, body = ask(silo, "rehearsal", **asked(silo, adapter, filler_bytes=len(adapter)))
    assert reply.rehearsed.filler == filler(digest_bytes(body), len(adapter))
    long, body = ask(silo, "rehearsal", rehearse=pb.Rehearse(filler_bytes=2**40))
    assert (long.refusal.rule, long.refusal.allowed) == ("filler_bytes", f"{len(body)}, the request's own")


def test_one_at_a_time_and_none_while_the_silo_is_at_work(silo):
    kind = {"rehearse": pb.Rehearse()}
    with silo._one_at_a_time:
        busy, _ = ask(silo, "rehearsal", **kind)
    with silo._rehearsals._under_way:
        second, _ = ask(silo, "rehearsal", **kind)
        described, _ = ask(silo, "describe", describe=pb.Describe())
    assert (busy.refusal.rule, second.refusal.rule) == (rehearsal.RULE, rehearsal.RULE)
    assert described.HasField("described")  # a rehearsal holds nobody up
    assert ask(silo, "rehearsal", **kind)[0].HasField("rehearsed")


def test_a_coordinator_rehearses_so_often_a_day(silo, monkeypatch):
    monkeypatch.setattr(rehearsal, "MOST_A_DAY", 2)
    replies = [ask(silo, f"rehearsal-{n}", rehearse=pb.Rehearse())[0] for n in range(3)]
    assert [reply.WhichOneof("kind") for reply in replies] == ["rehearsed", "rehearsed", "refusal"]
    assert replies[-1].refusal.allowed == "2"
    silo._rehearsals._asked[COORDINATOR.public_key][0] -= 24 * 3600 + 1
    assert ask(silo, "rehearsal", rehearse=pb.Rehearse())[0].HasField("rehearsed")


def test_a_stranger_rehearses_nothing(silo):
    stranger = signer_of(bytes(range(1, 33)))
    body = body_of("rehearsal", coordinator=stranger.public_key, rehearse=pb.Rehearse())
    assert opened(silo.handle(seal_request(stranger, body)), silo).refusal.rule == "coordinator"
    foreign = body_of("rehearsal", silo_id="south", rehearse=pb.Rehearse())
    assert opened(silo.handle(seal_request(COORDINATOR, foreign)), silo).refusal.rule == "silo_id"


def test_the_steward_sees_all_that_was_said(silo, tmp_path):
    reply, _ = ask(silo, "rehearsal", rehearse=pb.Rehearse(filler_bytes=10))
    lines = [json.loads(line) for line in (tmp_path / "state" / "audit.jsonl").read_text().splitlines()]
    assert [line["direction"] for line in lines] == ["accepted", "out"]
    assert lines[0]["kind"] == "rehearse"
    told = lines[1]["told"]
    assert (told["task"], told["columns"], told["room"]) == ("causal", ["text = text"], True)
    assert set(told) == {name.name for name, _ in reply.rehearsed.ListFields()} - {"filler"}


def test_no_room_by_the_stewards_own_number(tmp_path, tiny_model):
    """What is asked for moves no bound: nobody learns by asking how much is free."""
    silo = Silo(ward(tmp_path, tiny_model, max_request_bytes=2**50), TRUSTED)
    reply, _ = ask(silo, "rehearsal", rehearse=pb.Rehearse())
    silo.close()
    assert not reply.rehearsed.room
    assert shutil.disk_usage(tmp_path).free < 4 * 2**50
