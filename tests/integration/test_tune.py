"""A search with real gangs: killed, given again, and what it leaves behind."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import warm_commands
from small_corpus import write_corpus

from cluster.monitoring.status import lines, status
from cluster.tuning import ray_tune as tuning
from cluster.tuning.trial_kinds import PRETRAIN, validations
from configs.events import EventLog, read_events
from configs.load import load
from privacy.ledger.chain import verify_entries
from privacy.ledger.file import read_only

SILOWEAVE = Path(sys.executable).with_name("siloweave")
TRIALS = 3
SETTINGS = (
    "data.public.source=corpus.jsonl",
    "run.seed=2",  # of its three trials, number 1 has the weight decay that diverges
    "cluster.world_size=1",
    "cluster.max_failures=0",
    "pretrain.max_rollbacks=0",
    "pretrain.steps=6",
    "pretrain.warmup_steps=1",
    "pretrain.validate_every=2",
    "pretrain.commit_every=2",
)
PARAMS = ("pretrain.learning_rate=loguniform(1e-6,2e-2)", "pretrain.weight_decay=choice(0.1,0.1,0.1,1e30)")
DIVERGES = 1


def command(*arguments):
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    params = [part for param in PARAMS for part in ("--param", param)]
    return [SILOWEAVE, "tune", "-c", "tiny", *settings, *params, "--trials", str(TRIALS), "--json", *arguments]


def events(trial, kind):
    return [event for event in read_events(Path(trial["directory"]) / "events.jsonl") if event["event"] == kind]


def ended(document):
    return [trial for trial in json.loads(document.read_text())["trials"] if trial["status"] in ("finished", "stopped")]


def test_a_killed_search_goes_on_and_leaves_the_best_settings(tmp_path):
    run = tmp_path / "runs" / "tiny"
    write_corpus(tmp_path / "corpus.jsonl")
    document = run / "tune" / "tune.json"
    # 1. Killed as soon as a trial has ended, while another one is at work.
    first = warm_commands.Popen(command(), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 400
    while not (document.exists() and ended(document)):
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    everything = [child for child in psutil.Process(first.pid).children(recursive=True) if "Agent" not in child.name()]
    first.kill()
    first.communicate(timeout=300)
    assert not psutil.wait_procs(everything, timeout=300)[1]
    before = ended(document)
    assert len(before) < TRIALS
    # 2. Given again, in a process that hashes strings in another way: what has ended is not done again, the rest is.
    second = subprocess.run(command(), cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert second.returncode == 0, second.stderr
    found = json.loads(second.stdout)
    assert found == json.loads(document.read_text())
    assert "tune: trials 1 failed, " in "\n".join(lines(status(run)))
    failed = found["trials"].pop(DIVERGES)
    assert failed["status"] == "failed"
    assert "step 2: the gradient is not finite" in failed["cause"]
    assert {trial["status"] for trial in found["trials"]} <= {"finished", "stopped"}
    by_number = {trial["number"]: trial for trial in found["trials"]}
    for trial in before:
        assert len(events(by_number[trial["number"]], "start")) == 1
    # 3. A trial is a run: its losses, its commits, the one corpus of them all.
    for trial in found["trials"]:
        folder = Path(trial["directory"])
        assert (folder / "corpus").resolve() == run / "corpus"  # prepared once, for all
        assert trial["points"] == validations(load(str(folder / "config.toml")))
        assert (trial["step"] == 6) == (trial["status"] == "finished")
    assert len([e for e in read_events(run / "events.jsonl", "prepare") if e["event"] == "start"]) == 1
    # 4. The best one's settings are a configuration of its own.
    finished = [trial for trial in found["trials"] if trial["status"] == "finished"]
    best = min(finished, key=lambda trial: trial["validation_loss"])
    assert found["best"] == {key: best[key] for key in ("number", "values", "validation_loss")}
    config = load(found["best_config"])
    assert config.run.name == "tiny-best"
    assert config.pretrain.learning_rate == best["values"]["pretrain.learning_rate"]
    assert (run / "tune" / "trials.svg").read_text().rstrip().endswith("</svg>")
    assert not (run / "tune" / "ray").exists()
    # 5. Another search has no place there.
    other = warm_commands.run(
        command("--metric", "validation_bits_per_char"), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert other.returncode == 2
    assert "holds another search" in other.stderr


@pytest.fixture
def trial(tmp_path):
    """Settings of a trial that has reached some validation losses."""

    def make(name, losses):
        config = load("tiny", [f"run.storage={tmp_path}", f"run.name={name}"])
        log = EventLog(tmp_path / name / "events.jsonl")
        for step, loss in losses.items():
            log.emit("pretrain", "validation", step=step, loss=loss, bits_per_char=2 * loss)
        return config

    return make


def test_what_earlier_trials_reached_counts_when_others_are_stopped(trial):
    from types import SimpleNamespace

    known = {number: trial(f"known-{number}", {20: 1.0 + number, 40: 0.5 + number}) for number in range(3)}
    asha = tuning._asha(load("tiny").tune, "validation_loss", list(known.values()))
    tuning._replay(asha, PRETRAIN, known, "validation_loss")
    for name, loss, expected in (("bad", 2.9, "STOP"), ("good", 0.9, "CONTINUE")):
        new = SimpleNamespace(trial_id=name)
        asha.on_trial_add(None, new)
        assert asha.on_trial_result(None, new, {"step": 20, "validation_loss": loss}) == expected


def test_a_validation_that_was_done_again_counts_once(trial):
    config = trial("again", {20: 3.0, 40: 2.0})
    EventLog(Path(config.run.storage) / "again" / "events.jsonl").emit(
        "pretrain", "validation", step=20, loss=2.5, bits_per_char=5.0
    )
    assert [(point["step"], point["validation_loss"]) for point in validations(config)] == [(20, 2.5), (40, 2.0)]


@pytest.mark.parametrize(
    ("nodes", "overrides", "room"),
    [
        ([{"CPU": 8.0}], [], 4),
        ([{"CPU": 3.0}, {"CPU": 3.0}], [], 3),
        ([{"CPU": 3.0}, {"CPU": 3.0}], ["cluster.threads_per_rank=2"], 1),
        ([{"CPU": 1.0}], [], 0),
        ([{"CPU": 64.0, "GPU": 4.0}], [], 2),
        ([{"CPU": 64.0, "GPU": 4.0}], ["cluster.device=cpu"], 32),
    ],
)
def test_as_many_trials_at_once_as_gangs_fit_on_the_nodes(nodes, overrides, room):
    assert tuning._room(load("tiny", overrides), nodes) == room


def spends(root, silo):
    path = root / "state" / "siloweave" / "ledgers" / "plays-tiny" / silo / "ledger.sqlite"
    bodies = verify_entries(read_only(path), silo)
    return [body for body in bodies if body["kind"] == "reserve"]


def test_trials_over_federations_are_paid_one_by_one(tiny_run, siloweave, tmp_path, monkeypatch):
    """Each trial is a reservation of its own in every silo, charged once; what doesn't fit is refused before."""
    root = tmp_path / "federated"
    shutil.copytree(tiny_run.root, root)
    monkeypatch.setenv("XDG_STATE_HOME", str(root / "state"))  # its ledgers: the tiny run has spent already
    assert len(spends(root, "roman")) == 1
    params = (
        "federated.rounds=choice(1)",
        "federated.local_steps=choice(1)",
        "federated.learning_rate=uniform(0.01,0.1)",
    )
    arguments = ["tune", "-c", "tiny", "--json", "--set", "federated.workers=1"]
    arguments += [part for param in params for part in ("--param", param)]
    refused = siloweave(*arguments, "--trials", "9", cwd=root)
    assert refused.returncode == 3, refused.stderr
    assert "9 trials reserve epsilon 72 together, each one its own, and 24 is left" in refused.stderr
    assert len(spends(root, "roman")) == 1
    done = siloweave(*arguments, "--trials", "2", cwd=root, timeout_s=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [trial["status"] for trial in found["trials"]] == ["finished", "finished"]
    assert found["best"]["held_out_bits_per_char"] == min(t["held_out_bits_per_char"] for t in found["trials"])
    for silo, price in found["reserved"].items():
        mine = spends(root, silo)[1:]
        assert len(mine) == 2
        assert price["epsilon"] == pytest.approx(sum(body["epsilon"] for body in mine))
        assert 14 < price["epsilon"] <= 16
    # Given again, nothing is paid twice; one more trial is one more reservation.
    again = siloweave(*arguments, "--trials", "2", cwd=root)
    assert json.loads(again.stdout) == found
    assert len(spends(root, "roman")) == 3


def test_there_is_no_search_without_a_public_figure(tmp_path, siloweave):
    arguments = ["--set", "data.private.public=false", "--set", "evaluate.without_dp=false"]
    done = siloweave("tune", "-c", "tiny", *arguments, "--param", "privacy.max_grad_norm=uniform(0.5,2)", cwd=tmp_path)
    assert done.returncode == 2
    assert "there is no figure of private records to choose a trial by" in done.stderr
