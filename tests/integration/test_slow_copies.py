"""Real ranks on a store that takes its time: as long as bytes arrive nobody hangs, and a copy that stops is named."""

import json
import os
import shutil
import subprocess
import sys

from repository import SUPPORT

from trainer.checkpoints import checkpoints

HANG_S = 8  # a busy machine may keep a rank waiting for some seconds
SETTINGS = (
    "pretrain.steps=2",
    "pretrain.warmup_steps=1",
    "pretrain.commit_every=1",
    f"cluster.hang_timeout_s={HANG_S}",
)
# Ranks are warmed before they train: importing their libraries takes longer than this timeout.
GANGS = """
import json, os, sys
from pathlib import Path
from cluster.runtime.gang import _train_once
from cluster.runtime.placement import placed
from cluster.runtime.session import ray_session
from cluster.runtime.watch import RankFailed
from configs.load import load
from configs.run_directory import run_directory

config, events = load("tiny", sys.argv[1:]), []
with ray_session(config.cluster, 2) as ray:
    for way in ("stop step-00000001 1", "slow step-00000002 1"):
        Path(os.environ["SILOWEAVE_TEST_SLOW"]).write_text(way)
        with placed(config, "cpu", events.append, patient=True) as places:
            ray.get([rank.warm.remote(config, "cpu") for rank in places.ranks])
            try:
                _train_once(places, config, run_directory(config), events.append, [])
            except RankFailed as failure:
                events.append({"event": "failed", "cause": str(failure)})
print(json.dumps(events))
"""


def test_a_copy_that_stops_is_a_hang_and_one_that_takes_longer_than_the_timeout_is_not(tiny_run, tmp_path, monkeypatch):
    shutil.copytree(tiny_run.directory / "corpus", tmp_path / "store" / "tiny" / "corpus")
    monkeypatch.setenv("SILOWEAVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SILOWEAVE_TEST_SLOW", str(tmp_path / "way"))
    tests = SUPPORT
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tests / "slow_store"), os.environ.get("PYTHONPATH", "")]))
    settings = [*SETTINGS, f"run.storage=slow://{tmp_path}/store", f"cluster.scratch_dir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-c", GANGS, *settings], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    events = json.loads(done.stdout)
    # 1. Rank 1's first part arrives in part; rank 0, whose own is there, waits for it just as long.
    failures = [event["cause"] for event in events if event["event"] == "failed"]
    assert failures == [f"rank 1 hangs: nothing new for {HANG_S} s (cluster.hang_timeout_s) in phase commit of step 2"]
    # 2. Its last part takes longer than twice the timeout, and moves: the last commit stands.
    commits = [event for event in events if event["event"] == "commit"]
    assert [event["step"] for event in commits] == [1, 2]
    assert commits[-1]["seconds"] > 2 * HANG_S
    folder = tmp_path / "store" / "tiny" / "pretrain" / "checkpoints" / checkpoints.step_name(2)
    assert len(json.loads((folder / "COMMITTED").read_text())["files"]) == len(list(folder.glob("*.pt"))) >= 3
