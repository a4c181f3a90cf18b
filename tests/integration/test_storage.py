"""A run in an object store: moto's S3 on loopback, and machines that share nothing but it."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import warm_commands
from repository import SUPPORT
from small_corpus import write_corpus

from cluster import pipeline
from cluster.run import Run
from configs.errors import InputError
from configs.events import read_events
from configs.load import load
from configs.run_directory import run_directory
from configs.storage.bucket import Bucket
from configs.storage.manifests import Manifest, require_manifest
from configs.storage.mirror import open_mirror
from trainer.checkpoints import checkpoints

moto = pytest.importorskip("moto", reason="needs the extra `test`")
SILOWEAVE = Path(sys.executable).with_name("siloweave")
STEPS = 300  # ranks outlive their driver by a moment: it must not be enough for all of them
SETTINGS = (
    f"pretrain.steps={STEPS}",
    "pretrain.warmup_steps=4",
    "pretrain.commit_every=10",
    f"pretrain.validate_every={STEPS}",
)


def serve(**environment):
    """A server in a process of its own, and the variables with which clients reach it."""
    server = subprocess.Popen(
        [sys.executable, str(SUPPORT / "s3_server.py")],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    port = server.stdout.readline().strip()
    return server, {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@pytest.fixture(scope="module")
def s3():
    server, environment = serve()
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        import fsspec

        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
        yield environment
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.communicate("")


class Machine:
    """A cache and a scratch folder of its own; the silos' ledgers are elsewhere."""

    def __init__(self, root, name, monkeypatch):
        self.root, self.cache = root, root / name
        self.settings = [
            *SETTINGS,
            "run.storage=s3://bucket/runs",
            f"cluster.scratch_dir={self.cache / 'scratch'}",
            f"federated.state_dir={root / 'state'}",
            f'data.public.source="{root / "corpus.jsonl"}"',
            "federated.workers=1",
        ]
        (self.cache / "scratch").mkdir(parents=True)
        monkeypatch.setenv("SILOWEAVE_CACHE", str(self.cache))
        self.config = load("tiny", self.settings)
        self.directory = run_directory(self.config)

    def start(self, command, *options, popen=warm_commands.Popen):
        overrides = (part for setting in self.settings for part in ("--set", setting))
        return popen(
            [SILOWEAVE, command, "-c", "tiny", *overrides, *options],
            cwd=self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, command, *options, **given):
        process = self.start(command, *options, **given)
        output, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        return output

    def events(self, kind, stage="pretrain"):
        return [event for event in read_events(self.directory / "events.jsonl", stage) if event["event"] == kind]


def kill(process):
    children = [child for child in psutil.Process(process.pid).children(recursive=True) if "Agent" not in child.name()]
    process.kill()
    process.communicate(timeout=60)
    assert not psutil.wait_procs(children, timeout=60)[1]


@pytest.mark.timeout(1800)
def test_a_run_goes_on_from_the_store_on_machines_with_empty_caches(s3, tmp_path, monkeypatch):
    # 1. One machine prepares, and is lost while it trains.
    write_corpus(tmp_path / "corpus.jsonl")
    first = Machine(tmp_path, "first", monkeypatch)
    first.run("prepare")
    training = first.start("pretrain")
    deadline = time.monotonic() + 300
    while len(first.events("commit")) < 2:
        assert training.poll() is None, training.communicate()[1]
        assert time.monotonic() < deadline, "no second commit"
        time.sleep(0.02)
    kill(training)
    losses = {event["step"]: event["loss"] for event in first.events("step")}
    committed = checkpoints.steps(checkpoints.storage(first.config, first.directory))[-1]
    assert committed >= 20
    assert not (first.directory / "pretrain").exists()  # checkpoints never pass through the mirror
    shutil.rmtree(first.cache)
    # 2. Another one goes on from the newest commit; the steps done twice have the same losses.
    second = Machine(tmp_path, "second", monkeypatch)
    second.run("pretrain", popen=subprocess.Popen)  # it hashes strings in another way than the first one's fork
    assert second.events("resume")[-1]["step"] == committed
    again = {event["step"]: event["loss"] for event in second.events("step")}
    assert set(again) == set(range(committed + 1, STEPS + 1))
    for step in set(again) & set(losses):
        assert again[step] == pytest.approx(losses[step], rel=1e-6)
    assert second.events("commit")[-1]["step"] == STEPS
    shutil.rmtree(second.cache)
    # 3. A third one does all the rest; nothing that is done is done again.
    third = Machine(tmp_path, "third", monkeypatch)
    report = json.loads(third.run("demo", "--json"))
    assert len(third.events("start")) == 2  # of pretraining: the first and the second machine's
    assert third.events("end", "federated")
    shutil.rmtree(third.cache)
    # 4. A fourth one looks at it.
    fourth = Machine(tmp_path, "fourth", monkeypatch)
    status = json.loads(fourth.run("status", "--json"))
    assert {stage["state"] for stage in status["stages"].values()} == {"done"}
    assert status["pretrain"]["committed_step"] == STEPS
    stored = json.loads(open_mirror(fourth.config).bucket.read("report.json"))
    assert stored["pretrain"] == report["pretrain"]
    assert (fourth.directory / "federated" / "round-00002" / "COMMITTED").exists()


def test_s3_tells_of_the_parts_of_a_large_shard(s3, tmp_path):
    """Else one of tens of GB would look like a copy that stands still."""
    shard, told = tmp_path / "shard", []
    shard.touch()
    os.truncate(shard, 120 * 2**20)
    Bucket("s3://bucket/large", tmp_path).put(shard, "step-00000001/shard", lambda: told.append(time.monotonic()))
    assert len(told) >= 4  # three parts, and the whole


@pytest.mark.parametrize(
    ("storage", "expected"),
    [
        (
            "s3://no-such-bucket/runs",
            "run.storage 's3://no-such-bucket/runs/tiny' can't be written, read and cleaned: ",
        ),
        ("nope://bucket", "run.storage is 'nope://bucket/tiny': ValueError: Protocol not known: nope"),
    ],
)
def test_a_store_that_is_not_there_is_said_before_anything_is_done(s3, storage, expected, tmp_path, siloweave):
    done = siloweave(
        "prepare", "-c", "tiny", "--set", f"run.storage={storage}", cwd=tmp_path, SILOWEAVE_CACHE=str(tmp_path)
    )
    assert done.returncode == 2
    assert expected in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_store_without_permission_is_said_before_anything_is_done(tmp_path, siloweave):
    server, environment = serve(INITIAL_NO_AUTH_ACTION_COUNT="0")
    try:
        done = siloweave("pretrain", "-c", "tiny", "--set", "run.storage=s3://bucket", cwd=tmp_path, **environment)
    finally:
        server.communicate("")
    assert done.returncode == 2
    assert "run.storage 's3://bucket/tiny' can't be written, read and cleaned: PermissionError" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_machine_without_the_files_uses_the_corpus_and_none_replaces_one_that_was_trained_on(
    s3, tmp_path, monkeypatch
):
    source = tmp_path / "texts"
    source.mkdir()
    rows = [{"text": f"public text number {i} about subject {i % 7} and its {i * i} neighbours"} for i in range(300)]
    (source / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = [f'data.public.source="{source}"', "tokenizer.vocab_size=300", "data.near_duplicate_similarity=0.95"]
    config = load("tiny", ["run.storage=s3://bucket/runs", "run.name=texts", *values])
    said = []

    def prepared(machine):
        monkeypatch.setenv("SILOWEAVE_CACHE", str(tmp_path / machine))
        run = Run(config, (lambda event: said.append(event.get("message", "")),))
        pipeline.prepare(run)
        return require_manifest(run.files.corpus, "corpus", "prepare")

    first = prepared("one")
    source.rename(tmp_path / "elsewhere")
    assert prepared("two") == first
    assert any(line.endswith("the corpus as prepared is used") for line in said)
    (tmp_path / "elsewhere").rename(source)
    (source / "b.jsonl").write_text('{"text": "one more public text, which is as long as a text has to be"}\n')
    commits = checkpoints.storage(config, run_directory(config))
    digest = checkpoints.pretrain_digest(config, first.content_digest)
    commits.write("step-00000002/COMMITTED", Manifest(checkpoints.KIND, digest, metadata={"step": 2}).encode())
    with pytest.raises(InputError, match=r"1 new \(b\.jsonl\); 2 steps are trained on the files as they were"):
        prepared("three")
    (source / "b.jsonl").unlink()
    assert prepared("three") == first
