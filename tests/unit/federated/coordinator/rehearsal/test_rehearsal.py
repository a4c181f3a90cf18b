"""A rehearsal of real silos behind their services: the whole path, and each thing in its way by name, with its fix."""

import json
import time
from types import SimpleNamespace

import pytest
from rehearsed import Line, rehearse, served, settings
from silo_requests import ward

from configs.findings import Finding
from configs.load import load
from configs.run_directory import run_directory
from configs.storage.layout import RunFiles
from configs.storage.manifests import commit_manifest, require_manifest
from federated.aggregation.message_sizes import BESIDE_BYTES
from federated.coordinator.rehearsal.rehearsal import AGAIN, FACTS, REPLY, REQUEST, TRIAL, Heard, Step
from federated.coordinator.rehearsal.verdict import away, judged
from federated.coordinator.schedule.mail import pause_s
from federated.protocol import silo_pb2 as pb
from federated.silo import requests
from federated.silo.rehearsal import rehearsal as answers
from federated.silo.rehearsal import trial

LABELLED = ('federated.task="classification"', 'federated.labels=["ill", "well"]')


def wrong(site):
    """The one finding that does not hold."""
    (found,) = [finding for finding in site.findings if not finding.ok]
    assert not site.go
    assert found.fix and "\n" not in str(found)
    return found


def labelled(folder, model, labels):
    """A silo whose records have labels."""
    config = ward(folder, model, tasks=("classification",), labels=labels)
    rows = [json.dumps({"text": f"note {n} of the ward", "label": labels[n % len(labels)]}) for n in range(60)]
    (folder / "data.jsonl").write_text("\n".join(rows))
    return config


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """However busy the machine is."""
    monkeypatch.setattr(trial, "TRIAL_S", 400.0)


def test_the_whole_path(tmp_path, tiny_model):
    """Steps are taken on made-up records; what was heard of the line and the work makes the prediction."""
    with served(tmp_path, tiny_model) as north:
        site, rehearsal = rehearse(Line([north]), tmp_path, settings(tmp_path, tiny_model))
    assert site.go, site.findings
    names = [finding.check for finding in site.findings]
    assert names == [
        *("reached", "version", "clock", "base model", "task", "columns", "disk", "memory", "line", "step", "round")
    ]
    heard, found = rehearsal.heard["north"], site.prediction
    assert list(heard.steps) == [FACTS, REQUEST, REPLY, *AGAIN, TRIAL]
    assert (heard.records, found.steps) == (1, 2)
    assert min(found.step_s, found.first_s) > 0
    # A difference of two measured times, which is none where the longer one was held up less.
    assert heard.prepare_s == found.prepare_s >= 0
    # An update weighs what the request's adapter does, so that a reply is as long as a round's.
    assert abs(heard.steps[REPLY].reply_bytes - heard.steps[REQUEST].request_bytes) < BESIDE_BYTES / 8


def test_a_prediction_is_made_of_differences():
    """Of a silo with 5000 records, whose batch of 50 takes twice what was tried, and of a line of 1 Mbit/s up."""
    steps = {
        FACTS: Step(0.5, 0.1, 100, 300),
        REQUEST: Step(1.5, 0.1, 500_000, 300),
        REPLY: Step(5.5, 0.1, 500_000, 500_000),
        TRIAL: Step(30.0, 29.0, 500_000, 300),
    }
    heard = Heard(5000, "1", "d", "causal", outcome="done", records=25, prepare_s=0.5, step_s=0.25, steps=steps)
    config = load("tiny", ["federated.local_steps=4", "federated.round_timeout_s=5"])
    site = judged("north", heard, config, "d", required=True)
    found = site.prediction
    assert (found.latency_s, found.down_s, found.up_s) == (pytest.approx(0.4), pytest.approx(1.0), pytest.approx(4.0))
    assert (found.step_s, found.seconds) == (
        pytest.approx(0.5),
        pytest.approx(0.4 + 1 + 0.5 + 4 * 0.5 + 4 + pause_s(2.5) / 2),
    )
    # What a round's messages take is the middle one of three, whatever the shorter messages took.
    others = {AGAIN[0]: Step(2.1, 0.1, 500_000, 500_000), AGAIN[1]: Step(1.1, 0.1, 500_000, 500_000)}
    heard.steps = {**steps, **others}
    middle = judged("north", heard, config, "d", required=True).prediction
    assert (middle.latency_s, middle.down_s, middle.up_s) == (
        *(pytest.approx(0.4), pytest.approx(1.0)),
        pytest.approx(0.6),
    )
    heard.steps = {**steps, FACTS: Step(9.0, 0.1, 100, 300)}
    late = judged("north", heard, config, "d", required=True).prediction
    assert late.seconds == pytest.approx(found.seconds)  # one look that came late moves no round
    heard.steps = steps
    late = wrong(site)
    assert late.check == "round" and "send less over this line" in late.fix
    assert "4 Mbit/s down, 1 Mbit/s up" in next(one.found for one in site.findings if one.check == "line")
    heard.step_s = 25.0
    assert "fewer federated.local_steps" in wrong(judged("north", heard, config, "d", required=True)).fix


def test_a_line_that_is_too_slow_for_the_deadline(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(answers, "take", lambda *_: pb.Trial(outcome="done", records=1))
    with served(tmp_path, tiny_model) as north:
        config = settings(tmp_path, tiny_model, "federated.round_timeout_s=1")
        site, _ = rehearse(Line([north], down=25_000), tmp_path, config)
    found = wrong(site)
    assert found.check == "round" and "deadline 1 s" in found.found
    assert "federated.deadlines_s" in found.fix


def test_a_long_message_that_does_not_come_in_time():
    facts = {FACTS: Step(0.1, 0.0, 100, 100)}
    heard = Heard(100, "1", "d", "causal", steps=facts, trouble="no answer from north in 5 s; the run goes on")
    found = wrong(judged("north", heard, load("tiny"), "d", required=True))
    assert found.check == "line" and "raise federated.round_timeout_s" in found.fix
    heard.steps = {}
    assert wrong(judged("north", heard, load("tiny"), "d", required=True)).check == "reached"


def test_too_little_memory(tmp_path, tiny_model, monkeypatch):
    """A real limit of a real process."""
    little = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=200 * 2**20))
    monkeypatch.setattr(trial, "psutil", little)
    with served(tmp_path, tiny_model) as north:
        site, _ = rehearse(Line([north]), tmp_path, settings(tmp_path, tiny_model))
    found = wrong(site)
    assert (found.check, found.found) == ("memory", "too little for a step")
    assert "silo.micro_batch_size" in found.fix


def test_a_site_that_is_away():
    found = wrong(away("north", required=True, reason=""))
    assert (found.check, found.found) == ("reached", "not online")
    assert "siloweave silo relay -c relay.toml --check" in found.fix


def test_a_service_that_is_away(tmp_path, tiny_model):
    with served(tmp_path, tiny_model) as north:
        north.server.stop(0).wait()
        north.patience_s = 1.0
        site, _ = rehearse(Line([north]), tmp_path, settings(tmp_path, tiny_model))
    found = wrong(site)
    assert found.check == "service" and found.fix.startswith("at the site start `siloweave silo serve`")


def test_a_service_that_fails_inside(tmp_path, tiny_model, monkeypatch):
    """It is reached; what is wrong with it stands in its own log, and nowhere else."""
    monkeypatch.setattr(answers, "_has_room", lambda _: 1 / 0)
    with served(tmp_path, tiny_model) as north:
        site, _ = rehearse(Line([north]), tmp_path, settings(tmp_path, tiny_model))
    found = wrong(site)
    assert found.check == "service" and found.fix.startswith("see silo.log in the silo's state_dir")


@pytest.mark.parametrize("behind_s", [-400, 400])
def test_a_clock_that_is_off_by_400_seconds(tmp_path, tiny_model, monkeypatch, behind_s):
    clock = SimpleNamespace(monotonic=time.monotonic, time=lambda: time.time() - behind_s)
    monkeypatch.setattr(answers, "time", clock)
    monkeypatch.setattr(answers, "take", lambda *_: pb.Trial(outcome="done", records=1))
    with served(tmp_path, tiny_model) as north:
        site, _ = rehearse(Line([north]), tmp_path, settings(tmp_path, tiny_model))
    found = wrong(site)
    assert found.check == "clock"
    assert abs(int(found.found.split()[0]) - 400) < 60
    assert ("behind" in found.found) == (behind_s > 0) and "set the one that is wrong" in found.fix


def test_no_room_on_the_disk(tmp_path, tiny_model):
    with served(tmp_path, tiny_model, max_request_bytes=2**55) as north:
        site, rehearsal = rehearse(Line([north]), tmp_path, settings(tmp_path, tiny_model))
    assert wrong(site).check == "disk"
    assert rehearsal.heard["north"].outcome == ""


def test_a_disk_that_is_full(tmp_path, tiny_model):
    """What can't be written down can't be answered: the silo says so, and nothing else."""
    with served(tmp_path, tiny_model) as north:
        (tmp_path / "state" / "audit.jsonl").mkdir()
        north.patience_s = 1.0
        site, _ = rehearse(Line([north]), tmp_path, settings(tmp_path, tiny_model))
    found = wrong(site)
    assert found.check == "disk" and found.fix.startswith("make room on the disk of the silo's state_dir")


def test_another_base_model(tmp_path, tiny_model):
    config = settings(tmp_path, tiny_model)
    model = RunFiles(run_directory(config)).model
    there = require_manifest(model, "model", "export").content_digest
    (model / "README.md").write_text("another one")
    before = require_manifest(tiny_model, "model", "export")
    commit_manifest(model, before)
    assert require_manifest(model, "model", "export").content_digest != there
    with served(tmp_path, tiny_model) as north:
        site, _ = rehearse(Line([north]), tmp_path, config)
    found = wrong(site)
    assert found.check == "policy, base model" and site.refuses
    assert found.fix.startswith("copy this run's base model to the site")


@pytest.mark.parametrize(
    ("overrides", "policy", "check", "words"),
    [
        (LABELLED, {}, "policy, task", "federated.task here, policy.tasks there"),
        ((), {"max_epsilon_per_run": 1.0}, "policy", "lower privacy.epsilon"),
        ((), {"budget_epsilon": 1.0}, "policy", "lower privacy.epsilon"),
        ((), {"max_steps_per_round": 1}, "policy", "ask the silo's steward"),
        ((), {"max_request_bytes": 40_000}, "policy", "raise policy.max_request_bytes"),
    ],
)
def test_what_a_policy_refuses(tmp_path, tiny_model, overrides, policy, check, words):
    with served(tmp_path, tiny_model, **policy) as north:
        site, _ = rehearse(Line([north]), tmp_path, settings(tmp_path, tiny_model, *overrides))
    found = wrong(site)
    assert found.check == check and site.refuses
    assert words in found.fix


def test_all_refusals_are_said_at_once(tmp_path, tiny_model):
    with served(tmp_path, tiny_model, max_learning_rate=1e-3, max_epsilon_per_run=1.0, train=("full",)) as north:
        site, _ = rehearse(Line([north]), tmp_path, settings(tmp_path, tiny_model))
    found = [finding.found.split(":")[0] for finding in site.findings if not finding.ok]
    assert found == ["max_epsilon_per_run", "train", "max_learning_rate"]


def test_a_label_that_has_no_place(tmp_path, tiny_model):
    with served(tmp_path, tiny_model, labelled(tmp_path, tiny_model, ("ill", "healthy"))) as north:
        site, _ = rehearse(Line([north]), tmp_path, settings(tmp_path, tiny_model, *LABELLED))
    found = wrong(site)
    assert found.check == "policy, labels"
    assert "ill, well" in found.found and "ill, healthy" in found.found
    task = next(finding for finding in site.findings if finding.check == "task")
    assert task.found == "classification of ill, healthy"


def test_a_column_that_has_no_place(tmp_path, tiny_model):
    template = 'federated.template="{age} years: {text}"'
    with served(tmp_path, tiny_model, labelled(tmp_path, tiny_model, ("ill", "well"))) as north:
        site, _ = rehearse(Line([north]), tmp_path, settings(tmp_path, tiny_model, *LABELLED, template))
    found = wrong(site)
    assert found.check == "policy, columns" and "whose fields data.columns names" in found.fix
    columns = next(finding for finding in site.findings if finding.check == "columns")
    assert columns.found == "text = text, label = label"


def test_a_silo_of_an_older_version(tmp_path, tiny_model, monkeypatch):
    """It takes the new kind of request for one of no kind."""
    parse = requests._parse

    def older(message, content):
        parse(message, content)
        if isinstance(message, pb.Request):
            message.ClearField("rehearse")

    monkeypatch.setattr(requests, "_parse", older)
    with served(tmp_path, tiny_model) as north:
        site, _ = rehearse(Line([north]), tmp_path, settings(tmp_path, tiny_model))
    found = wrong(site)
    assert (found.check, found.fix) == ("version", "older version: upgrade the site to this one")


def test_a_silo_that_says_what_nobody_can_say_is_rejected(tmp_path, tiny_model, monkeypatch):
    """Its words reach a terminal: other filler, endless seconds and unknown outcomes end here."""
    for change in (
        lambda told: setattr(told, "filler", b"x"),
        lambda told: setattr(told, "clock", float("nan")),
        lambda told: setattr(told, "seconds", -1.0),
        lambda told: setattr(told.trial, "outcome", "\x1b[2J"),
        lambda told: setattr(told.trial, "first_seconds", float("inf")),
    ):
        with served(tmp_path, tiny_model) as north:
            answer = north.silo._rehearsals.answer

            def lying(*given, answer=answer, change=change):
                told = answer(*given)
                change(told)
                return told

            monkeypatch.setattr(north.silo._rehearsals, "answer", lying)
            site, _ = rehearse(Line([north]), tmp_path, settings(tmp_path, tiny_model))
        assert "the reply" in wrong(site).found


def test_a_finding_is_one_line():
    assert str(Finding("disk", ok=True, found="room")) == "ok  disk: room"
    assert str(Finding("disk", ok=False, found="none", fix="make some")) == "FIX disk: none; make some"
