"""Jobs on a real Ray head with its job server: upload, refusals, exit status, stop, and going on."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from ports import free_port

from cluster.runtime import jobs
from configs.errors import InputError, SiloweaveError
from configs.load import load


@pytest.fixture(scope="module")
def server():
    """Address of the job server of a Ray head of our own."""
    with ExitStack() as stack:
        try:
            address = stack.enter_context(ray_head())
        except AssertionError:  # Ray gives its raylet 30 s to start, which a busy machine may not
            address = stack.enter_context(ray_head())
        yield address


@contextmanager
def ray_head():
    """A head on ports of its own, so that another Ray may be here."""
    gcs, jobs_port, agent, client = (free_port() for _ in range(4))
    options = {
        "--node-ip-address": "127.0.0.1",
        "--port": gcs,
        "--dashboard-host": "127.0.0.1",
        "--dashboard-port": jobs_port,
        "--dashboard-agent-listen-port": agent,
        "--ray-client-server-port": client,
        "--num-cpus": 2,
        "--object-store-memory": 80 * 2**20,
    }
    # A short path: Ray's sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--temp-dir={folder}"]
        command += [f"{name}={value}" for name, value in options.items()]
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
        said = Path(folder) / "head.log"
        with (
            said.open("w") as log,
            subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT) as head,
        ):
            try:
                yield wait_for(f"http://127.0.0.1:{jobs_port}", head, said)
            finally:
                head.terminate()  # ends the processes that it has started, and no other Ray's
                head.wait(timeout=300)


def wait_for(address, head, said):
    """The job server, once the whole head is up: the server is there before the raylet, and may go with it again."""
    deadline = time.monotonic() + 300
    while True:
        try:
            found = jobs.find_server(address)
            if "Ray runtime started" in said.read_text():
                return found
        except InputError:
            pass
        assert head.poll() is None, said.read_text()
        assert time.monotonic() < deadline, "no job server"
        time.sleep(0.5)


def submit(siloweave, server, root, *words, **more):
    command = [*words, "--set", f"run.storage={root / 'runs'}"]
    options = ["--address", server, "--json", "--python", more.get("python", sys.executable), *more.get("options", ())]
    return siloweave("submit", *options, "--", *command, cwd=root)


def job_ids(server):
    """Every job that the cluster has seen."""
    from ray.job_submission import JobSubmissionClient

    return {job.submission_id for job in JobSubmissionClient(server).list_jobs()}


def test_a_stopped_job_goes_on_when_it_is_submitted_again(siloweave, server, tmp_path):
    # It does nothing before it is stopped, however late that comes.
    interpreter, go_on = tmp_path / "interpreter", tmp_path / "go on"
    interpreter.write_text(f"#!/bin/sh\nwhile [ ! -e '{go_on}' ]; do sleep 0.1; done\nexec {sys.executable} \"$@\"\n")
    interpreter.chmod(0o755)
    started = submit(
        siloweave, server, tmp_path, "prepare", "-c", "tiny", options=["--no-wait"], python=str(interpreter)
    )
    assert started.returncode == 0, started.stderr
    job = json.loads(started.stdout)["job"]
    # Two drivers must never write to one run.
    with pytest.raises(InputError, match=f"job {job} is at work on it"):
        jobs.Jobs(server).submit(load("tiny", [f"run.storage={tmp_path / 'runs'}"]), ["prepare"], sys.executable)
    stopped = siloweave("job", "stop", job, "--address", server, "--json", cwd=tmp_path)
    assert (json.loads(stopped.stdout)["status"], json.loads(stopped.stdout)["exit_status"]) == ("STOPPED", 1)
    manifest = tmp_path / "runs" / "tiny" / "corpus" / "manifest.json"
    assert not manifest.exists()

    go_on.touch()
    again = submit(siloweave, server, tmp_path, "prepare", "-c", "tiny", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["status"] == "SUCCEEDED"
    assert f'"directory": "{tmp_path}/runs/tiny"' in again.stderr  # the job's own output
    made = manifest.stat().st_mtime_ns
    third = submit(siloweave, server, tmp_path, "prepare", "-c", "tiny")
    assert third.returncode == 0, third.stderr
    assert manifest.stat().st_mtime_ns == made  # nothing was done again


def test_a_job_that_fails_passes_its_exit_status_on(siloweave, server, tmp_path):
    done = submit(siloweave, server, tmp_path, "export", "-c", "tiny")
    assert done.returncode == 2
    ended = json.loads(done.stdout)
    assert (ended["status"], ended["exit_status"]) == ("FAILED", 2)
    assert "run `siloweave prepare` first" in done.stderr
    shown = siloweave("job", "status", ended["job"], "--address", server, cwd=tmp_path)
    assert "exit_status: 2" in shown.stdout
    assert "siloweave export --config submitted.toml" in shown.stdout
    logs = siloweave("job", "logs", ended["job"], "--address", server, "--follow", cwd=tmp_path)
    assert logs.returncode == 2
    assert "run `siloweave prepare` first" in logs.stdout


def test_an_interpreter_that_the_nodes_lack(siloweave, server, tmp_path):
    done = submit(siloweave, server, tmp_path, "plan", "-c", "tiny", python="/nowhere/python")
    assert done.returncode == 1
    assert json.loads(done.stdout)["message"] == "the nodes have no such interpreter; give theirs with --python"


def test_a_jobs_command_has_no_shell_above_it(siloweave, server, tmp_path):
    """Before: of 25 jobs that were stopped as they started 2 went on, beside the next one that wrote to their run."""
    interpreter, seen = tmp_path / "interpreter", tmp_path / "parent"
    interpreter.write_text(f"#!/bin/sh\ncat /proc/$PPID/cmdline > {seen}\n")
    interpreter.chmod(0o755)
    done = submit(siloweave, server, tmp_path, "plan", "-c", "tiny", python=str(interpreter))
    assert done.returncode == 0, done.stderr
    assert seen.read_bytes().startswith(b"ray::JobSupervisor")  # which is what Ray signals when a job is stopped
    assert json.loads(done.stdout)["command"].startswith(f"{interpreter} -m siloweave plan")


def test_unknown_jobs_are_one_clear_line(siloweave, server, tmp_path):
    done = siloweave("job", "stop", "raysubmit_none", "--address", server, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    cluster = jobs.Jobs(server)
    for ask in (cluster.details, cluster.logs):
        with pytest.raises(InputError, match="raysubmit_none does not exist"):
            ask("raysubmit_none")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prepare", "-c", "tiny"], "run.storage is 'runs': give an absolute path"),
        (["demo", "-c", "tiny", "--set", "run.storage=/shared"], "federated.state_dir is empty: give an absolute"),
        (
            ["prepare", "-c", "tiny", "--set", "run.storage=/shared", "--set", "data.public.source=a.txt"],
            "data.public.source is 'a.txt': give an absolute path",
        ),
        (
            ["pretrain", "-c", "tiny", "--set", "run.storage=/shared", "--set", "cluster.address=head:6379"],
            "cluster.address is 'head:6379': a job runs in the cluster that takes it",
        ),
        (["pretrain", "-c", "tiny", "--address", "head:6379"], "give it before, as the job server's"),
        (["ledger", "show", "x"], "'ledger' can't be submitted"),
        (["prepare", "-c", "none.toml"], "none.toml: no such file"),
    ],
)
def test_what_can_not_move_is_refused_before_anything_is_sent(siloweave, server, tmp_path, words, message):
    before = job_ids(server)
    done = siloweave("submit", "--address", server, "--", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert job_ids(server) == before


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://127.0.0.1:1", "no Ray job server answers there"),
        ("127.0.0.1:1", "no Ray job server answers there"),
        ("ray://127.0.0.1:10001", "give http://HOST:PORT"),
        ("http://head", "give http://HOST:PORT"),
        ("http://head:x", "give http://HOST:PORT"),
        ("", "--address is empty"),
    ],
)
def test_an_address_where_nothing_answers_is_one_clear_line(monkeypatch, address, reason):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(InputError, match=reason):
        jobs.find_server(address)


def test_another_web_server_is_not_taken_for_ray(tmp_path):
    import http.server
    import threading

    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as other:
        threading.Thread(target=other.handle_request, daemon=True).start()
        with pytest.raises(InputError, match="something else answers: HTTP 404"):
            jobs.find_server(f"http://127.0.0.1:{other.server_port}")


def test_a_cluster_says_that_it_is_alive(server):
    assert jobs.find_server(server.removeprefix("http://")) == server


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of the code, with things beside it and in it that must stay."""
    root = tmp_path / "checkout"
    for package in ("configs", "trainer", "privacy", "federated", "cluster"):
        shutil.copytree(jobs._ROOT / package, root / package)
    for name in ("siloweave.py", "pyproject.toml"):
        shutil.copyfile(jobs._ROOT / name, root / name)
    for name in ("data/a.jsonl", "runs/tiny/config.toml", "state/x/key.pem", ".git/config", "configs/hospital.toml"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("private")
    (root / "cluster" / "siloweave.key").write_text("private")
    (root / "cluster" / "notes.csv").write_text("private")
    monkeypatch.setattr(jobs, "_ROOT", root)
    return root


def test_only_the_code_and_the_settings_are_uploaded(checkout, tmp_path):
    folder = tmp_path / "upload"
    folder.mkdir()
    size = jobs.stage_upload(load("tiny", ["run.storage=/shared"]), folder)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert 100_000 < size < jobs.LARGEST_UPLOAD_BYTES
    assert not [name for name in names if "private" in (folder / name).read_text()[:8]]
    assert {Path(name).suffix for name in names if "/" in name} <= {".py", ".j2", ".proto", ".toml", ""}
    assert {name for name in names if "/" not in name} == {"siloweave.py", "pyproject.toml", "submitted.toml"}
    assert load(str(folder / "submitted.toml")) == load("tiny", ["run.storage=/shared"])


def test_the_upload_runs_where_siloweave_is_not_installed(checkout, tmp_path):
    folder = tmp_path / "upload"
    folder.mkdir()
    jobs.stage_upload(load("tiny"), folder)
    code = (
        "import sys; sys.path[:] = ['.', *[p for p in sys.path if p and 'checkout' not in p]]\n"
        "from importlib.metadata import distribution; print(distribution('siloweave').locate_file(''))\n"
        "import siloweave, cluster.commands.stages, federated.coordinator.rounds\n"
        "print(cluster.__file__, federated.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    where, packages = done.stdout.splitlines()
    assert Path(folder, where).resolve() == folder
    assert all(Path(folder, path).is_relative_to(folder) for path in packages.split())


def test_an_upload_that_is_too_large_is_not_sent(checkout, tmp_path):
    (checkout / "trainer" / "weights.py").write_bytes(bytes(jobs.LARGEST_UPLOAD_BYTES))
    folder = tmp_path / "upload"
    folder.mkdir()
    with pytest.raises(SiloweaveError, match="move what is no code out of"):
        jobs.stage_upload(load("tiny"), folder)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("PENDING", None, None),
        ("RUNNING", None, None),
        ("SUCCEEDED", 0, 0),
        ("FAILED", 1, 1),
        ("FAILED", 2, 2),
        ("FAILED", 3, 3),
        ("FAILED", 127, 1),
        ("FAILED", None, 1),
        ("STOPPED", None, 1),
    ],
)
def test_the_exit_status_is_one_of_siloweaves(status, code, expected):
    assert jobs.exit_status(status, code) == expected
