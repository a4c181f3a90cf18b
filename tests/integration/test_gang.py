"""Pretraining with real ranks: killed, damaged, too large for the machine, and against plain PyTorch."""

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import warm_commands
from clusters import ray_cluster
from plain_training import plain_losses
from ports import free_port

from configs.events import read_events
from trainer.checkpoints import checkpoints
from trainer.data.packing import TokenFile, stored_dtype
from trainer.objectives.causal import next_token_nats

SILOWEAVE = Path(sys.executable).with_name("siloweave")


def events(run, kind):
    return [event for event in read_events(run / "events.jsonl", "pretrain") if event["event"] == kind]


def losses(run):
    """The last loss of every step."""
    return {event["step"]: event["loss"] for event in events(run, "step")}


def wait_for(condition, seconds=600.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return found


def command_of(process):
    """A process's command line; nothing of one that has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture
def prepared(tiny_run, tmp_path):
    """A run directory with the tiny corpus, ready to pretrain a while longer than tiny does."""

    def prepare(*overrides):
        arguments = ["-c", "tiny", *(part for override in overrides for part in ("--set", override))]
        storage = tmp_path / "runs" / "tiny"
        storage.mkdir(parents=True)
        for name in ("corpus", "tokenizer"):
            shutil.copytree(tiny_run.directory / name, storage / name)
        return arguments, storage

    return prepare


def start(arguments, cwd, popen=warm_commands.Popen):
    return popen(
        [SILOWEAVE, "pretrain", *arguments], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_zero_training_equals_plain_pytorch(tiny_run):
    """Two ranks under ZeRO-2 with clipping against a loop on one process: the same loss at every step."""
    config = tiny_run.config()
    found = losses(tiny_run.directory)
    assert [event["step"] for event in events(tiny_run.directory, "validation")] == [20, 40]  # the last moment's, too
    for step, loss in plain_losses(config, tiny_run.directory / "corpus", config.pretrain.steps).items():
        assert found[step] == pytest.approx(loss, rel=1e-4), step


# Twenty in turn, as long as it is from commit to commit: whatever goes on from a commit begins a stage.
STAGES = ", ".join(["{steps=20, context_length=32, frozen=1}, {steps=20, learning_rate=0.005}"] * 10)


def test_killed_ranks_and_a_killed_driver_resume_exactly(prepared, tiny_run, tmp_path):
    settings = ("pretrain.steps=400", "pretrain.commit_every=20", "pretrain.validate_every=400")
    arguments, run = prepared(*settings, f"pretrain.stages=[{STAGES}]")
    first = start(arguments, tmp_path)
    wait_for(lambda: len(events(run, "commit")) >= 2)
    # 1. One rank dies: the gang restarts by itself from the last commit.
    victim = wait_for(lambda: [p for p in children(first) if "RankActor" in command_of(p)])[0]
    victim.kill()
    restart = wait_for(lambda: events(run, "restart"))[0]
    assert "died" in restart["cause"]
    resume = wait_for(lambda: events(run, "resume"))[0]
    assert resume["step"] % 20 == 0
    # 2. The driver is killed, nothing of it is left running, and the command is given again.
    wait_for(lambda: max(losses(run)) > resume["step"] + 20)
    # Ray's own agents look for their parent now and then, and leave by themselves.
    ours = [child for child in children(first) if "Agent" not in child.name()]
    first.kill()
    first.communicate(timeout=300)
    assert not psutil.wait_procs(ours, timeout=300)[1]
    reported = max(losses(run))
    committed = max(int(path.parent.name[5:]) for path in run.glob("pretrain/checkpoints/step-*/COMMITTED"))
    second = start([*arguments, "--set", "cluster.max_failures=0"], tmp_path, subprocess.Popen)  # other hashes
    _, errors = second.communicate(timeout=600)
    assert second.returncode == 0, errors
    assert events(run, "resume")[-1]["step"] == committed
    # 3. Every step that was done twice had the same loss both times, and the whole curve is there, but for what the
    #    ranks did and committed in the moment in which they outlived their driver.
    seen = {}
    for event in events(run, "step"):
        assert event["loss"] == pytest.approx(seen.setdefault(event["step"], event["loss"]), rel=1e-6)
    assert set(range(1, 401)) - set(seen) <= set(range(reported + 1, committed + 1))
    assert losses(run)[400] < losses(run)[1]
    # 4. Each step and each commit says its stage; what an earlier start has trained by is not to be changed.
    assert {event["training_stage"] for event in events(run, "step") if event["step"] == 390} == {20}
    newest = max(run.glob("pretrain/checkpoints/step-*")) / "COMMITTED"
    assert json.loads(newest.read_text())["metadata"]["training_stage"] == 20
    errors = finish([*arguments, "--set", f"pretrain.stages=[{STAGES.replace('32', '16', 1)}]"], tmp_path, 2)
    assert "pretrain.stages.0.context_length was 32 and is 16); choose another run.name" in errors


def children(process):
    return [child for child in psutil.Process(process.pid).children(recursive=True) if child.is_running()]


def finish(arguments, cwd, expected):
    process = start(arguments, cwd)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == expected, errors
    return errors


def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(tiny_run, tmp_path):
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(tiny_run.directory, run)
    newest = run / "pretrain" / "checkpoints" / "step-00000040"
    shard = next(newest.glob("*optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    expected = losses(run)
    errors = finish(["-c", "tiny"], tmp_path, 0)
    assert "its digest doesn't hold; going back to the commit before" in errors
    assert events(run, "resume")[-1]["step"] == 30
    assert losses(run)[40] == pytest.approx(expected[40], rel=1e-6)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from configs.load import load
from configs.storage.storage import Folder
from trainer.checkpoints.committer import Committer
from trainer.pretraining.engine import build_engine
from trainer.rank import Rank, join_process_group, prepare_process

root, scratch, port = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
rank = Rank(0, 1, 0, 1, "127.0.0.1", port, "cpu", 1)
prepare_process(rank)
join_process_group(rank, 60)
config = load("tiny", ["cluster.world_size=1"])
engine = build_engine(config, rank, 512)
commits = Committer(config, Folder(root), scratch, rank, "attempt", 0, "digest", lambda event: None)
commits.commit(engine, 1, {})
commits.finish()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
commits.commit(engine, 2, {})
"""


def test_a_full_disk_leaves_the_last_commit_intact(tmp_path):
    """A real DeepSpeed engine whose process may not let a file grow beyond 20 kB (RLIMIT_FSIZE)."""
    root, scratch = tmp_path / "checkpoints", tmp_path / "scratch"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(root), str(scratch), str(free_port())],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert "the commit before it is intact" in done.stderr
    assert "set cluster.scratch_dir" in done.stderr
    assert not (root / "step-00000002").exists()
    found = checkpoints.newest(root, "digest", pytest.fail)
    assert (found.step, found.manifest.metadata["world_size"]) == (1, 1)


def test_more_ranks_than_the_cluster_has_is_said_before_anything_starts(prepared, tmp_path):
    arguments, run = prepared("cluster.placement_timeout_s=3")
    with ray_cluster() as (cluster, _):
        errors = finish([*arguments, "--address", cluster.address], tmp_path, 2)
    assert "the gang needs 2 CPU, the Ray cluster has 1; waiting up to 3 s for nodes, then giving up" in errors
    assert (
        "error: cluster.world_size 2: the gang needs 2 CPU, the Ray cluster has 1; lower cluster.world_size" in errors
    )
    assert not events(run, "step")


def test_no_ray_at_the_address_is_an_input_error(prepared, tmp_path):
    arguments, _ = prepared()
    errors = finish([*arguments, "--address", "127.0.0.1:1"], tmp_path, 2)
    assert "no Ray answers there" in errors


def test_pretraining_needs_a_corpus(tmp_path):
    errors = finish(["-c", "tiny"], tmp_path, 2)
    assert "run `siloweave prepare` first" in errors


def test_the_export_is_a_hugging_face_directory(tiny_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_run.model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_run.model)
    tokens = TokenFile(
        tiny_run.directory / "corpus" / "tokens-validation.bin", 64, stored_dtype(tiny_run.directory / "corpus")
    )
    batch = torch.from_numpy(tokens.windows(torch.arange(tokens.num_windows).numpy()))
    with torch.no_grad():
        loss = next_token_nats(model, batch).item() / batch[:, 1:].numel()
    counts = json.loads((tiny_run.directory / "corpus" / "manifest.json").read_text())["metadata"]["validation"]
    bits = loss / math.log(2) * counts["tokens"] / counts["characters"]
    assert bits == pytest.approx(tiny_run.report["pretrain"]["validation_bits_per_char"], rel=1e-4)
    assert tokenizer.decode(tokenizer.encode("def f(x): return x", add_special_tokens=False)) == "def f(x): return x"
    assert "license: apache-2.0" in (tiny_run.model / "README.md").read_text()
