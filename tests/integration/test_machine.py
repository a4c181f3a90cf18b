"""A run on a machine that gives little, and how it ends when it is told to."""

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

from configs.events import read_events

SILOWEAVE = Path(sys.executable).with_name("siloweave")
NARROW_FILES, NARROW_SHM = 256, "64m"
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def with_little_shared_memory(command):
    """The command, in a view of the mounts where /dev/shm has as much as a container has by default."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return command
    script = f'mount -t tmpfs -o size={NARROW_SHM} tmpfs /dev/shm && exec "$@"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *command]


_WITH_FEW_FILES = """
import os, resource, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children would ignore it
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[1])))
os.execvp(sys.argv[2], sys.argv[2:])
"""


def with_few_files(files, command):
    """By a process of its own: what Python does between fork and exec may meet the threads of a library here."""
    return [sys.executable, "-c", _WITH_FEW_FILES, str(files), *command]


def addresses_of(processes):
    """Where they listen."""
    listening = [each for one in processes for each in one.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    return {each.laddr.ip.removeprefix("::ffff:") for each in listening}


@pytest.mark.parametrize(
    ("number", "awaited", "status"), [(signal.SIGTERM, "commit", 143), (signal.SIGINT, "start", 130)]
)
def test_a_run_on_a_narrow_machine_goes_and_ends_when_it_is_told_to(tiny_run, tmp_path, number, awaited, status):
    """Dead proxies, no HOME, 64 MB of shared memory, 256 open files, and a folder that is called as folders may be.

    Before: SIGTERM ended it with status 15 or by the signal itself, in silence; Ctrl-C with 130, in silence.
    """
    storage = tmp_path / "runs #1 100% a+b&c='d'? [e] ünï;$HOME"
    for name in ("corpus", "tokenizer"):
        shutil.copytree(tiny_run.directory / name, storage / "tiny" / name)
    settings = [f'run.storage="{storage}"', "pretrain.steps=100000", "pretrain.commit_every=2"]
    command = [str(SILOWEAVE), "pretrain", "-c", "tiny", *(part for one in settings for part in ("--set", one))]
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    process = psutil.Popen(
        with_few_files(NARROW_FILES, with_little_shared_memory(command)),
        cwd=tmp_path,
        env={**environment, **dict.fromkeys(PROXIES, "http://127.0.0.1:9")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 240
    while not any(event["event"] == awaited for event in read_events(storage / "tiny" / "events.jsonl", "pretrain")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, f"no {awaited} in time"
        time.sleep(0.05)
    started = process.children(recursive=True)
    assert addresses_of([process, *started]) <= {"127.0.0.1"}, "other machines reach it"
    process.send_signal(number)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == status, errors
    assert errors.splitlines()[-1] == f"ended by {number.name}; what was committed is kept"
    assert "Traceback" not in errors
    assert not psutil.wait_procs(started, timeout=60)[1], "it has left processes"
    assert not list((storage / "tiny").parent.glob(".tiny.lock")), "the run is not locked any more"


_JOIN = """
import os, sys
from cluster.runtime.session import ray_session
from configs.load import load
with ray_session(load("tiny").cluster, 1):
    sys.exit("it started")
"""


@pytest.mark.parametrize(
    ("environment", "files", "told"),
    [
        ({"RAY_ADDRESS": "127.0.0.1:9"}, 1024, "RAY_ADDRESS in the environment is '127.0.0.1:9'.*`unset RAY_ADDRESS`"),
        ({"TMPDIR": f"/tmp/{'t' * 60}"}, 1024, "TMPDIR is '/tmp/t+'.* bytes, and 107 are the most; set RAY_TMPDIR"),
        ({"RAY_TMPDIR": "/dev/null/x"}, 1024, "RAY_TMPDIR is '/dev/null/x', and /dev/null is no folder"),
        ({}, 100, "100 files may be open at once, and Ray needs 256: `ulimit -n 4096`"),
    ],
)
def test_what_the_machine_does_not_allow_is_said_before_ray_starts(tmp_path, environment, files, told):
    """Before: Ray tried for minutes, raised an OSError of its own, or lost its processes one after the other."""
    done = subprocess.run(
        with_few_files(files, [sys.executable, "-c", _JOIN]),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert re.search(f"InputError: .*{told}", done.stderr), done.stderr


_HOLD = """
import os, sys
from cluster.runtime.session import ray_session
from configs.load import load
before = dict(os.environ)
for _ in range(2):
    with ray_session(load("tiny").cluster, 1) as ray:
        print(ray.get_runtime_context().gcs_address, os.environ["RAY_AUTH_TOKEN"], flush=True)
        sys.stdin.readline()
print({name for name in os.environ if name.startswith("RAY_AUTH") and os.environ[name] != before.get(name)})
"""
_SEND = """
import logging, os, ray, sys
ray.init(sys.argv[1], logging_level=logging.CRITICAL, log_to_driver=False)
print(ray.get(ray.remote(lambda: os.getpid()).remote()))
"""


def test_a_ray_of_our_own_takes_code_from_nobody_else(tmp_path):
    """Before: from whoever reached one of its ports, which were open on all addresses of the machine."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = psutil.Popen(
        [sys.executable, "-c", _HOLD], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    tokens = []
    others = [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}]
    for other in others:
        address, token = process.stdout.readline().split()
        tokens.append(token)
        assert addresses_of([process, *process.children(recursive=True)]) == {"127.0.0.1"}
        there = {**environment, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # 127.0.0.1 is not to be another address
        sent = _sent(address, {**there, **other}, tmp_path)
        assert (sent.returncode, "ConnectionError" in sent.stderr) == (1, True), sent
        mine = _sent(address, {**there, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}, tmp_path)
        assert (mine.returncode, mine.stdout.strip().isdigit()) == (0, True), mine
        process.stdin.write("\n")
        process.stdin.flush()
    assert process.communicate(timeout=60)[0] == "set()\n"
    assert len({*tokens}) == 2
    assert all(re.fullmatch("[0-9a-f]{64}", token) for token in tokens)


def _sent(address, environment, folder):
    command = [sys.executable, "-c", _SEND, address]
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )
