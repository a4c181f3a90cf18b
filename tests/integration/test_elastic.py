"""The number of ranks changes, and the losses do not: on real gangs, against ranks that nothing happens to."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import warm_commands
from clusters import ray_cluster
from repository import SUPPORT
from small_corpus import write_corpus

from configs.events import read_events
from trainer.checkpoints import resize as elastic

SILOWEAVE = Path(sys.executable).with_name("siloweave")
# The numbers of targets in a batch's rows differ, and each leg begins with a stage of training: the ranks before it
# have gone on into that stage by two steps, and are killed there.
STAGED = """pretrain.stages=[
    {steps=10, context_length=16, frozen="embeddings"}, {steps=10, context_length=32, learning_rate=0.005},
    {steps=10, frozen=1}, {steps=10},
]"""
DATA = ("data.packing=documents", "data.public.source=corpus.jsonl", STAGED)


def options(settings):
    return [part for setting in settings for part in ("--set", setting)]


@pytest.fixture
def prepared(tiny_run, tmp_path):
    """A run directory with a corpus."""

    def prepare(*data):
        run = tmp_path / "runs" / "tiny"
        run.mkdir(parents=True)
        if data:
            write_corpus(tmp_path / "corpus.jsonl")
            warm_commands.run(
                [SILOWEAVE, "prepare", "-c", "tiny", *options(data)], cwd=tmp_path, check=True, timeout=600
            )
        else:
            for name in ("corpus", "tokenizer"):
                shutil.copytree(tiny_run.directory / name, run / name)
        return run

    return prepare


def events(run, kind):
    return [event for event in read_events(run / "events.jsonl", "pretrain") if event["event"] == kind]


def losses(run):
    return {event["step"]: event["loss"] for event in events(run, "step")}


def test_one_rank_two_four_a_kill_and_two_again(prepared, tmp_path):
    run = prepared(*DATA)
    settings = ("cluster.world_size=4", "pretrain.micro_batch_size=1", *DATA)
    done = warm_commands.run(
        [SILOWEAVE, "pretrain", "--verify-resume", "--json", "-c", "tiny", *options(settings)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["holds"]
    assert document["largest_deviation"] <= document["tolerance"] == 1e-5
    assert [leg["ranks"] for leg in document["legs"]] == [1, 2, 4, 2]
    assert [leg["first"] for leg in document["legs"]] == [1, 5, 9, 13]
    assert all(leg["convert_s"] is not None for leg in document["legs"][1:])
    assert not events(run, "step")
    assert sorted(path.name for path in run.parent.iterdir()) == ["tiny"]


STAGES = """
import json, sys
from pathlib import Path
from cluster.runtime.session import ray_session
from cluster.checks.verify_resume import verify_resume
from configs.load import load

directory, key = Path(sys.argv[1]), sys.argv[2]
found = []
with ray_session(load("tiny").cluster, 4):
    for stage, sizes, more in (
        (0, (1, 2), ['pretrain.optimizer="sgd"', "pretrain.learning_rate=1"]),
        (1, (2, 4), ['pretrain.optimizer="momentum"', "pretrain.learning_rate=0.3"]),
        (3, (2, 4), ['pretrain.offload_optimizer="cpu"', f'run.encryption_key_file="{key}"']),
        (2, (1, 2), ['pretrain.precision="bf16"']),
    ):
        settings = [f"pretrain.zero_stage={stage}", "pretrain.micro_batch_size=1", *more]
        found.append(verify_resume(load("tiny", settings), directory, lambda event: None, sizes))
print(json.dumps(found))
"""


def test_other_stages_optimizers_and_bf16_offloaded_and_encrypted_commits_resize_too(prepared, tmp_path):
    key = tmp_path / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(32))
    done = subprocess.run(
        [sys.executable, "-c", STAGES, str(prepared()), str(key)],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [document["zero_stage"] for document in found] == [0, 1, 3, 2]
    for document, tolerance in zip(found, (1e-5, 1e-5, 1e-5, 1e-3), strict=True):
        assert document["largest_deviation"] <= document["tolerance"] == tolerance, found
        assert document["holds"]
    converted = [document["legs"][-1]["convert_s"] for document in found]
    assert converted[0] is None  # nothing is sharded
    assert None not in converted[1:]


def test_what_we_read_out_of_the_shards_is_what_deepspeed_s_own_converter_finds(tiny_run, tmp_path):
    """Its universal format holds every parameter's master weights and moments in one piece."""
    from deepspeed.checkpoint import ds_to_universal

    commit = max((tiny_run.directory / "pretrain" / "checkpoints").glob("step-*"))
    arguments = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    folders = {"input_folder": str(commit), "output_folder": str(tmp_path / "universal"), "inject_missing_state": False}
    ds_to_universal.main(Namespace(**folders, **arguments))
    universal = tmp_path / "universal" / "zero"
    shards = elastic.saved_shards(commit, 2, 2, lambda path: torch.load(path, map_location="cpu", weights_only=False))
    found = {}
    for shard in shards:
        for piece in shard.pieces:
            for key, flat in shard.states[piece.group].items():
                part = flat[piece.start : piece.start + piece.numel]
                found.setdefault((piece.name, key), []).append((piece.offset, part))
    names = {path.parent.name for path in universal.rglob("fp32.pt")}
    assert {name for name, _ in found} == names
    for (name, key), parts in found.items():
        whole = torch.cat([part for _, part in sorted(parts, key=lambda item: item[0])])
        expected = torch.load(universal / name / f"{key}.pt", weights_only=False)["param"]
        assert torch.equal(whole, expected.flatten()), (name, key)


class Elastic:
    """A driver on a Ray cluster whose nodes come and go, one CPU each."""

    def __init__(self, root, run, address):
        self.run = run
        settings = ("cluster.min_world_size=1", "cluster.max_failures=4", "pretrain.validate_every=40")
        self.process = warm_commands.Popen(
            [SILOWEAVE, "pretrain", "-c", "tiny", *options(settings), "--address", address],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait(self, condition, seconds=300.0):
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.05)
        return found

    def gang(self, number):
        return self.wait(lambda: len(found := events(self.run, "gang")) >= number and found)[number - 1]

    def commits(self, step):
        self.wait(lambda: any(event["step"] >= step for event in events(self.run, "commit")))


@pytest.fixture
def slow(tmp_path, monkeypatch):
    """A file; while it is there, ranks on nodes that are started from now on are held up in every step."""
    faults = tmp_path / "faults"
    faults.mkdir()
    path = os.pathsep.join([str(SUPPORT / "faults"), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("SILOWEAVE_TEST_FAULTS", str(faults))
    (faults / "slow").touch()
    return faults / "slow"


def test_a_lost_node_takes_a_rank_and_a_new_one_gives_it_back(tiny_run, prepared, slow, tmp_path):
    run = prepared()
    with ray_cluster() as (cluster, add_node), ExitStack() as ending:
        gang = Elastic(tmp_path, run, cluster.address)
        ending.callback(gang.process.kill)
        # 1. More ranks than there is room for: it says so and waits; a node comes.
        (waiting,) = gang.wait(lambda: events(run, "waiting"))
        assert "the gang needs 2 CPU, the Ray cluster has 1" in waiting["message"]
        node = add_node()
        assert gang.gang(1)["world_size"] == 2
        gang.commits(10)
        # 2. The node is lost: one rank goes on from the last commit.
        cluster.remove_node(node, allow_graceful=False)
        assert gang.gang(2)["world_size"] == 1
        (lost,) = events(run, "restart")
        assert re.search(r"rank \d's process (died|does not answer any more)", lost["cause"])
        gang.commits(20)
        # 3. Another one comes: the next restart has two ranks again.
        add_node()
        os.kill(gang.gang(2)["pids"][0], signal.SIGKILL)
        assert gang.gang(3)["world_size"] == 2
        slow.unlink()
        _, errors = gang.process.communicate(timeout=400)
        assert gang.process.returncode == 0, errors
    resized = [(event["from_ranks"], event["to_ranks"]) for event in events(run, "convert")]
    assert resized == [(2, 1), (1, 2)]
    # 4. The reference: the same steps on two ranks that nothing happens to.
    undisturbed = losses(tiny_run.directory)
    assert sorted(undisturbed) == sorted(losses(run)) == list(range(1, 41))
    for event in events(run, "step"):  # steps that were done again included
        assert event["loss"] == pytest.approx(undisturbed[event["step"]], rel=1e-5)
