"""How far a run is, read from its files: finished, interrupted, failed, and while somebody looks on."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.monitoring.status import lines, status

SILOS = {"comedies", "histories", "problems", "roman", "romances", "tragedies"}


@pytest.fixture
def copy(tiny_run, tmp_path):
    """The tiny run, to be cut short."""
    return Path(shutil.copytree(tiny_run.directory, tmp_path / "tiny"))


def keep_events(directory, number):
    log = directory / "events.jsonl"
    kept = log.read_text().splitlines()[:number]
    log.write_text("\n".join(kept) + '\n{"time": 1, "stage": "pre')  # a kill cut the last line short
    return [json.loads(line) for line in kept]


def test_a_finished_run(tiny_run, siloweave):
    report = tiny_run.report
    found = json.loads(siloweave("status", "-c", "tiny", "--json", cwd=tiny_run.root).stdout)
    assert {stage["state"] for stage in found["stages"].values()} == {"done"}
    for stage, seconds in report["seconds"].items():
        assert found["stages"][stage]["seconds"] >= seconds  # other tests may have repeated a stage
    assert (found["pretrain"]["step"], found["pretrain"]["committed_step"]) == (40, 40)
    assert found["pretrain"]["loss"] == report["pretrain"]["loss_last"]
    assert found["pretrain"]["validation_bits_per_char"] == report["pretrain"]["validation_bits_per_char"]
    assert found["pretrain"]["tokens_per_s"] > 0
    assert (found["federated"]["round"], found["federated"]["committed_round"]) == (2, 2)
    assert set(found["federated"]["silos"]) == SILOS
    for name, silo in found["federated"]["silos"].items():
        told = report["privacy"]["silos"][name]
        assert silo["epsilon_reserved"] == told["epsilon"]
        assert silo["epsilon_left"] == told["epsilon_left"]
        assert (silo["rounds_charged"], silo["stated"]) == (told["charges"], True)
    by_directory = siloweave("status", str(tiny_run.directory), cwd=Path("/"))
    assert "epsilon 8 reserved, 24 left, 2 of 2 rounds charged" in by_directory.stdout
    assert "step 40/40, committed 40, loss " in by_directory.stdout


def test_a_run_cut_short_while_it_pretrained(copy):
    for name in ("model", "federated", "federated-no-dp"):
        shutil.rmtree(copy / name)
    for name in ("evaluation.json", "sample.txt", "showcase.json", "report.json"):
        (copy / name).unlink()
    (copy / "pretrain" / "checkpoints" / "step-00000040" / "COMMITTED").unlink()
    log = [json.loads(line) for line in (copy / "events.jsonl").read_text().splitlines()]
    at = next(i for i, event in enumerate(log) if event["event"] == "step" and event["step"] == 35)
    event = keep_events(copy, at + 1)[-1]
    found = status(copy)
    states = {stage: value["state"] for stage, value in found["stages"].items()}
    assert (states["prepare"], states["pretrain"]) == ("done", "started")
    assert {states[stage] for stage in states if stage not in ("prepare", "pretrain")} == {"waiting"}
    pretrain = found["pretrain"]
    assert (pretrain["step"], pretrain["committed_step"], pretrain["loss"]) == (35, 30, event["loss"])
    assert found["last_event"]["time"] == event["time"]
    assert found["federated"]["silos"] == {}


def test_a_run_cut_short_while_it_federated(copy):
    for name in ("manifest.json", "certificate.json", "round-00002/COMMITTED"):
        (copy / "federated" / name).unlink()
    log = [json.loads(line) for line in (copy / "events.jsonl").read_text().splitlines()]
    at = next(i for i, event in enumerate(log) if (event["stage"], event["event"]) == ("federated", "round"))
    keep_events(copy, at + 1)
    federated = status(copy)["federated"]
    assert status(copy)["stages"]["federated"]["state"] == "started"
    assert (federated["round"], federated["committed_round"]) == (1, 1)
    assert set(federated["silos"]) == SILOS
    for silo in federated["silos"].values():
        assert (silo["rounds_charged"], silo["stated"]) == (1, False)
        assert 7.5 < silo["epsilon_reserved"] <= 8
    assert "at least 1 of 2 rounds charged" in "\n".join(lines(status(copy)))


def test_restarts_and_refusals_are_shown(copy):
    events = [
        {"time": 1.0, "stage": "pretrain", "event": "restart", "attempt": 1, "cause": "a rank's process died"},
        {"time": 2.0, "stage": "federated", "event": "refused", "silo": "roman", "message": "silo roman refuses: x"},
        {"time": 3.0, "stage": "federated", "event": "timeout", "step": "1", "missing": 2},
    ]
    with (copy / "events.jsonl").open("a") as log:
        log.writelines(json.dumps(event) + "\n" for event in events)
    found = status(copy)
    assert found["pretrain"]["restarts"] == 1
    assert [trouble["detail"] for trouble in found["troubles"]][-3:] == [
        "a rank's process died",
        "silo roman refuses: x",
        "step 1, missing 2",
    ]
    assert "  pretrain: restart: a rank's process died" in lines(found)


def test_a_stage_that_failed_says_so_and_nothing_of_its_data(siloweave, tmp_path):
    arguments = ["-c", "tiny", "--set", "data.public.source=secret-name.jsonl"]
    assert siloweave("prepare", *arguments, cwd=tmp_path).returncode == 2
    done = siloweave("status", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "prepare         failed" in done.stdout
    assert "prepare: failed: error InputError" in done.stdout
    assert "secret-name" not in (tmp_path / "runs" / "tiny" / "events.jsonl").read_text()


def test_following_shows_it_anew_until_it_is_interrupted(copy):
    command = [str(Path(sys.executable).with_name("siloweave")), "status", str(copy), "--follow", "--json"]
    # A shell starts background jobs, and so perhaps these tests, with SIGINT ignored, which children inherit.
    command = ["env", "--default-signal=INT", *command]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as following:
        assert json.loads(following.stdout.readline())["troubles"] == []
        with (copy / "events.jsonl").open("a") as log:
            log.write('{"time": 1.0, "stage": "pretrain", "event": "restart", "cause": "x"}\n')
        shown = (json.loads(line)["pretrain"]["restarts"] for line in following.stdout)
        assert 1 in shown  # the first one after it was written; a busy machine may have shown the old one again
        following.send_signal(signal.SIGINT)
        assert following.wait(timeout=300) == 0


@pytest.mark.parametrize("arguments", [["."], ["-c", "tiny"]])
def test_where_no_run_is(siloweave, tmp_path, arguments):
    done = siloweave("status", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "no run here" in done.stderr
    assert not list(tmp_path.iterdir())
