"""The figures of ``siloweave status`` while a run pretrains, from events written by hand."""

import json
import time

import pytest

from cluster.monitoring.status import lines, status
from cluster.report.page import _epsilon_plot
from configs.events import EventLog
from configs.load import load
from configs.parse import to_toml


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.toml").write_text(to_toml(load("tiny")))
    return tmp_path


def step(log, number, **more):
    values = {"steps": 40, "loss": 2.5, "learning_rate": 0.5, "tokens": 512, "seconds": 0.5, **more}
    log.emit("pretrain", "step", step=number, **values)


def test_figures_of_a_run_at_work(run, monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    log = EventLog(run / "events.jsonl")
    log.emit("pretrain", "start")
    for number in range(1, 11):
        step(log, number, gflop_per_s=20.0 + number % 2, mfu=0.25, peak_memory_bytes=5, gpu_memory_bytes=None)
    log.emit("pretrain", "commit", step=10)
    log.emit("pretrain", "restart", attempt=1, cause="rank 1's process died")
    monkeypatch.setattr(time, "time", lambda: now + 300)
    found = status(run)["pretrain"]
    assert (found["tokens_per_s"], found["gflop_per_s"], found["mfu"]) == (1024, 20.5, 0.25)
    assert (found["memory_bytes"], found["gpu_memory_bytes"]) == (5, None)
    assert found["seconds_left"] == 30 * 0.5
    assert found["last_commit_age_s"] == pytest.approx(300, abs=1)
    assert (found["restarts"], found["failures"]) == (1, 1)
    shown = "\n".join(lines(status(run)))
    assert "1,024 tokens/s, 20.5 GFLOP/s (25.0% of the peak), 15 s left, last commit 5 min ago" in shown
    assert "failures 1, restarts 1" in shown


def test_a_run_that_ended_over_its_failures_counts_the_last_one_too(run):
    log = EventLog(run / "events.jsonl")
    log.emit("pretrain", "restart", attempt=1, cause="rank 1's process died")
    log.emit("pretrain", "failed", error="SiloweaveError")
    log.emit("pretrain", "failed", error="KeyboardInterrupt")
    found = status(run)["pretrain"]
    assert (found["restarts"], found["failures"]) == (1, 2)


def test_events_of_an_older_siloweave_lack_some_figures(run):
    step(EventLog(run / "events.jsonl"), 1)
    found = status(run)
    assert (found["pretrain"]["gflop_per_s"], found["pretrain"]["last_commit_age_s"]) == (None, None)
    assert "GFLOP" not in "\n".join(lines(found))


def test_a_search_is_summed_up(run):
    (run / "tune").mkdir()
    trials = [{"status": state} for state in ("finished", "stopped", "stopped", "waiting")]
    (run / "tune" / "tune.json").write_text(json.dumps({"trials": trials, "best": {"number": 0}}))
    found = status(run)
    assert found["tune"]["trials"] == {"finished": 1, "stopped": 2, "waiting": 1}
    assert "  tune: trials 1 finished, 2 stopped, 1 waiting; best so far: 0" in lines(found)


@pytest.mark.parametrize("name", ["$\\foo$", "a$b$\\x$", "\x1b[2J", "<script>"])
def test_a_report_is_drawn_whatever_a_silo_is_called(name):
    """A name that looks like a formula ended the report."""
    plan = {"sampling_rate": 0.02, "max_grad_norm": 1.0, "noise_multiplier": 0.9, "rounds": 2, "steps_per_round": 4}
    privacy = {"plan": {**plan, "delta": 1e-5}, "epsilon": 1.0, "delta": 1e-5, "silos": {name: {"rounds_charged": 2}}}
    drawn = _epsilon_plot({"privacy": privacy, "federated": {"rounds": 2}})
    assert "<script>" not in drawn
    assert "\x1b" not in drawn
