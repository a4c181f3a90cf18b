"""A gang through every kind of failure: the losses are those of an uninterrupted run."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import warm_commands
from clusters import ray_cluster
from plain_training import plain_losses
from repository import SUPPORT

from configs.events import read_events
from configs.load import load

SILOWEAVE = Path(sys.executable).with_name("siloweave")
STEPS = 200
HANG_S = 300  # no rank takes so long on a busy machine; the time passes when a test says so
SETTINGS = (f"pretrain.steps={STEPS}", "pretrain.commit_every=10", f"pretrain.validate_every={STEPS}")


def events(run, kind):
    return [event for event in read_events(run / "events.jsonl", "pretrain") if event["event"] == kind]


def losses(run):
    return {event["step"]: event["loss"] for event in events(run, "step")}


def wait_for(condition, process, seconds=600.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return found


def prepared(tiny_run, root):
    run = root / "runs" / "tiny"
    run.mkdir(parents=True)
    for name in ("corpus", "tokenizer"):
        shutil.copytree(tiny_run.directory / name, run / name)
    return run


def start(cwd, *arguments, popen=warm_commands.Popen, **environment):
    settings = (part for setting in SETTINGS for part in ("--set", setting))
    return popen(
        [SILOWEAVE, "pretrain", "-c", "tiny", *settings, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes_of(process):
    """The driver and everything below it."""
    driver = psutil.Process(process.pid)
    return [driver, *driver.children(recursive=True)]


@pytest.fixture(scope="module")
def uninterrupted(tiny_run, tmp_path_factory):
    """The losses of a run that nothing happens to, by a driver that hashes strings in another way than forks do."""
    root = tmp_path_factory.mktemp("uninterrupted")
    run = prepared(tiny_run, root)
    process = start(root, popen=subprocess.Popen)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return losses(run)


class Scenario:
    """One run with standbys and an injector of faults, for one failure after the other."""

    def __init__(self, root, run):
        self.run, self.faults = run, root / "faults"
        self.faults.mkdir()
        (self.faults / "slow").touch()
        path = os.pathsep.join([str(SUPPORT / "faults"), os.environ.get("PYTHONPATH", "")])
        options = ("cluster.standbys=true", "cluster.max_failures=5", f"cluster.hang_timeout_s={HANG_S}")
        arguments = (part for option in options for part in ("--set", option))
        self.process = start(root, *arguments, PYTHONPATH=path, SILOWEAVE_TEST_FAULTS=str(self.faults))

    def wait(self, condition):
        return wait_for(condition, self.process)

    def gangs(self, number):
        return self.wait(lambda: len(found := events(self.run, "gang")) >= number and found)

    def trains_on(self, steps=5):
        """Waits for further steps of the gang that runs now."""
        before = len(events(self.run, "step"))
        self.wait(lambda: len(events(self.run, "step")) >= before + steps)

    def between_commits(self):
        """Waits until the driver knows of every committed step, and the next commit is some steps away."""
        self.wait(lambda: events(self.run, "step")[-1]["step"] % 10 in (3, 4, 5))

    def cause(self, number):
        return self.wait(lambda: len(found := events(self.run, "restart")) >= number and found)[number - 1]["cause"]

    def time_passes(self, *awake):
        """So much that it is a hang, for a driver to whom these ranks go on answering."""
        (self.faults / "named").write_text(" ".join(map(str, awake)))
        (self.faults / "named").rename(self.faults / "later")

    def recovers(self, number, expected):
        """The failure's cause is as expected, and training goes on from the newest commit."""
        assert re.search(expected, self.cause(number))
        self.gangs(number + 1)
        assert self.wait(lambda: len(found := events(self.run, "resume")) >= number and found)[-1]["step"] % 10 == 0
        self.trains_on()


def test_a_gang_survives_every_kind_of_failure(tiny_run, uninterrupted, tmp_path):
    run = prepared(tiny_run, tmp_path)
    gang = Scenario(tmp_path, run)
    try:
        # 1. A standby dies: training is not disturbed, and another one takes its place.
        standbys = gang.wait(lambda: len(found := events(run, "standby")) >= 2 and found)
        os.kill(standbys[0]["pid"], signal.SIGKILL)
        gang.wait(lambda: events(run, "standby_died"))
        standbys = gang.wait(lambda: len(found := events(run, "standby")) >= 3 and found)[1:]
        assert not events(run, "restart")
        # 2. A rank dies: both ranks are the former standbys.
        os.kill(gang.gangs(1)[0]["pids"][1], signal.SIGKILL)
        gang.recovers(1, "rank 1's process died")
        assert set(gang.gangs(2)[1]["pids"]) == {standby["pid"] for standby in standbys}
        # 3. A rank raises, before the new standbys are warm.
        (gang.faults / "raise-1").touch()
        gang.recovers(2, "rank 1 raised ValueError: injected")
        # 4. A rank hangs but answers; one that does not answer is stopped from outside.
        (gang.faults / "hang-1").touch()
        gang.wait(lambda: not (gang.faults / "hang-1").exists())
        gang.time_passes(0, 1)
        gang.recovers(3, rf"rank 1 hangs: nothing new for {HANG_S} s .* in phase forward of step \d+$")
        stopped = psutil.Process(gang.gangs(4)[3]["pids"][0])
        gang.between_commits()  # what a stopped process has not told is lost
        stopped.suspend()
        gang.time_passes(1)
        gang.recovers(4, rf"rank 0 hangs: nothing new for {HANG_S} s .* of step \d+, its process does not answer$")
        assert not psutil.wait_procs([stopped], timeout=300)[1]
        # 5. A gradient that is not finite is not stepped on: back to the commit, and past the data since then.
        (gang.faults / "nan-1").touch()
        back = gang.wait(lambda: events(run, "rollback"))[0]
        gang.gangs(6)
        gang.trains_on()
        everything = processes_of(gang.process)
        (gang.faults / "slow").unlink()
        _, errors = gang.process.communicate(timeout=600)
        assert gang.process.returncode == 0, errors
    finally:
        gang.process.kill()
    assert "gloo" not in errors
    assert not psutil.wait_procs(everything, timeout=300)[1]
    assert back["cause"] == f"step {back['step']}: the gradient is not finite"
    before = [event for event in events(run, "step") if event["time"] < back["time"]]
    for event in before:  # steps that were done again included
        assert event["loss"] == pytest.approx(uninterrupted[event["step"]], rel=1e-6)
    assert sorted(losses(run)) == list(range(1, STEPS + 1))
    first, end = back["skipped_batches"]
    assert first % 10 == 0
    assert end == back["step"]
    # Rounding makes curves drift apart; other data is another thing.
    config, after = load("tiny", SETTINGS), range(first + 1, first + 11)
    expected = plain_losses(config, run / "corpus", after[-1], [(first, end)])
    assert distance(losses(run), expected, after) < 0.25 * distance(losses(run), uninterrupted, after)
    assert losses(run)[first + 1] == pytest.approx(expected[first + 1], rel=1e-2)


def distance(one, other, steps):
    return sum(abs(one[step] - other[step]) for step in steps)


def test_a_run_that_diverges_ends_with_its_first_cause(tiny_run, tmp_path):
    """Other data does not help it; what was committed before stays."""
    run = prepared(tiny_run, tmp_path)
    settings = ("pretrain.weight_decay=1e30", "pretrain.commit_every=1", "cluster.world_size=1")
    process = start(tmp_path, *(part for setting in settings for part in ("--set", setting)))
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 1, errors
    assert "error: step 2: the gradient is not finite, after 3 rollbacks (pretrain.max_rollbacks)" in errors
    assert checkpoints_of(run) == [1]
    assert [event["skipped_batches"] for event in events(run, "rollback")] == [[1, 2], [2, 3], [3, 4]]
    assert not events(run, "restart")


def checkpoints_of(run):
    return sorted(int(path.parent.name[5:]) for path in run.glob("pretrain/checkpoints/step-*/COMMITTED"))


def test_a_lost_node_costs_one_restart_elsewhere(tiny_run, uninterrupted, tmp_path):
    run = prepared(tiny_run, tmp_path)
    with ray_cluster() as (cluster, add_node):
        nodes = [add_node() for _ in range(2)]
        process = start(tmp_path, "--address", cluster.address, "--set", "cluster.standbys=true")
        wait_for(lambda: len(events(run, "commit")) >= 1, process)
        pids = events(run, "gang")[0]["pids"]
        victim = next(node for node in nodes if node_of(node, pids))
        cluster.remove_node(victim, allow_graceful=False)
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    assert len(events(run, "restart")) == 1
    for event in events(run, "step"):
        assert event["loss"] == pytest.approx(uninterrupted[event["step"]], rel=1e-6)


def node_of(node, pids):
    """Whether one of the processes belongs to the node's raylet."""
    raylets = [info.process.pid for info in node.all_processes["raylet"]]
    return any(child.pid in pids for pid in raylets for child in psutil.Process(pid).children(recursive=True))
