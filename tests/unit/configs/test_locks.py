"""One command at a time writes to a run, whichever way the one before it ended."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
from repository import REPOSITORY
from typer.testing import CliRunner

from configs import locks
from configs.errors import InputError, SiloweaveError
from configs.locks import HeldError, locked, note_of_holder, working_on
from siloweave import app

AT_WORK = """
import sys
from pathlib import Path
from configs.locks import working_on
sys.argv = ["siloweave", "pretrain", "--set", "run.name=x"]
with working_on(Path({directory!r})):
    print("at work", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_command(directory):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, "-c", AT_WORK.format(directory=str(directory))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    with process:
        assert process.stdout.readline() == b"at work\n"
        yield process
        process.stdin.close()


def test_who_has_patience_gets_it_after_the_other(tmp_path):
    with another_command(tmp_path / "runs" / "x") as other:
        threading.Timer(0.5, other.stdin.close).start()
        with working_on(tmp_path / "runs" / "x", patience_s=60):
            assert other.wait(timeout=300) == 0


def test_a_second_command_is_told_who_is_at_work(tmp_path):
    with another_command(tmp_path / "runs" / "x") as other:
        with pytest.raises(InputError) as caught, working_on(tmp_path / "runs" / "x"):
            pass
        line = str(caught.value)
        assert f"`siloweave pretrain` (process {other.pid} on {socket.gethostname()}), since 20" in line
        assert "wait for it or end it" in line
        assert "\n" not in line
        with working_on(tmp_path / "runs" / "y"):  # another run is no matter
            pass
    with working_on(tmp_path / "runs" / "x"):
        pass
    assert not (tmp_path / "runs").exists()


def test_a_lock_dies_with_its_process(tmp_path):
    with another_command(tmp_path / "x") as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
        with working_on(tmp_path / "x"):
            pass


def test_stages_inside_each_other_are_one_command_and_the_folder_may_be_renamed(tmp_path):
    (tmp_path / "x").mkdir()
    with working_on(tmp_path / "x"):
        (tmp_path / "x").rename(tmp_path / "x-until-now")
        with working_on(tmp_path / "x"):
            pass
        assert note_of_holder(tmp_path / ".x.lock")  # the inner one has not let go of it
    assert note_of_holder(tmp_path / ".x.lock") is None


def test_many_that_wait_for_it_hold_it_one_after_the_other(tmp_path):
    """It is removed by each one that lets go of it; a lock on a file that was removed must not count."""
    taking = """
import os, sys
from pathlib import Path
from configs.locks import locked
folder = Path(sys.argv[1])
for _ in range(100):
    with locked(folder / "lock", b"", wait=True):
        os.close(os.open(folder / "alone", os.O_CREAT | os.O_EXCL))
        (folder / "alone").unlink()
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", taking, str(tmp_path)]
    processes = [subprocess.Popen(command, env=environment) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert not list(tmp_path.iterdir())


def test_an_error_inside_lets_go(tmp_path):
    with pytest.raises(ZeroDivisionError), working_on(tmp_path / "x"):
        raise ZeroDivisionError
    with working_on(tmp_path / "x"):
        pass


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b'{"host": "h"}'])
def test_a_holder_that_has_not_said_who_it_is_holds_all_the_same(tmp_path, note):
    with locked(tmp_path / ".x.lock", note):
        assert note_of_holder(tmp_path / ".x.lock") == note
        with pytest.raises(InputError, match="another command, is at work"), working_on(tmp_path / "x"):
            pass
        with pytest.raises(HeldError), locked(tmp_path / ".x.lock", b""):
            pass


def test_a_file_system_without_locks_is_said_to_have_none(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(InputError, match="no working locks"), working_on(tmp_path / "x"):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(SiloweaveError, match="could not be written"), working_on(tmp_path / "runs" / "x"):
        pass


@pytest.mark.parametrize("kind", ["ext4", "fuse.s3fs"])
@pytest.mark.parametrize("host", ["elsewhere", socket.gethostname()])
def test_a_word_from_elsewhere_counts_where_locks_do_not_reach_it(tmp_path, monkeypatch, kind, host):
    mount = type("Mount", (), {"mountpoint": "/", "fstype": kind, "opts": "rw"})
    monkeypatch.setattr(locks.psutil, "disk_partitions", lambda **_: [mount])
    left = {"host": host, "pid": 7, "command": "siloweave federate", "since": "2026-01-01 10:00:00+00:00"}
    (tmp_path / ".x.lock").write_text(json.dumps(left))
    if (host, kind) == ("elsewhere", "fuse.s3fs"):
        with (
            pytest.raises(InputError, match=r"process 7 on elsewhere.*\(fuse.s3fs\).*delete"),
            working_on(tmp_path / "x"),
        ):
            pass
        assert json.loads((tmp_path / ".x.lock").read_text()) == left
        return
    with working_on(tmp_path / "x"):
        pass


@pytest.mark.parametrize(
    ("kind", "options", "unsure"),
    [
        ("nfs4", "rw,local_lock=none", ""),
        ("nfs", "rw,nolock,local_lock=all", "nfs"),
        ("lustre", "rw,flock", ""),
        ("lustre", "rw,localflock", "lustre"),
        ("xfs", "rw", ""),
        ("cifs", "rw", "cifs"),
    ],
)
def test_which_file_systems_are_trusted(tmp_path, monkeypatch, kind, options, unsure):
    root = type("Mount", (), {"mountpoint": "/", "fstype": "overlay", "opts": "rw"})
    covered = type("Mount", (), {"mountpoint": str(tmp_path), "fstype": "ext4", "opts": "rw"})
    mount = type("Mount", (), {"mountpoint": str(tmp_path), "fstype": kind, "opts": options})
    monkeypatch.setattr(locks.psutil, "disk_partitions", lambda **_: [root, covered, mount])
    assert locks._unsure(tmp_path / "x") == unsure


def test_commands_that_write_are_kept_out_and_those_that_look_are_not(tmp_path, monkeypatch):
    monkeypatch.setenv("SILOWEAVE_DEBUG", "1")  # so that no command quietens this process for good
    settings = ["-c", "tiny", "--set", f"run.storage={tmp_path}"]

    def siloweave(*words):
        return CliRunner().invoke(app, ["--debug", *words, *settings])

    stages = ["demo", "prepare", "pretrain", "export", "federate", "evaluate", "generate", "report", "audit"]
    search = ["tune", "--param", "pretrain.learning_rate=loguniform(1e-4,1e-2)"]
    writing = [*([stage] for stage in stages), ["pretrain", "--verify-resume"], search, ["federation", "run", "folder"]]
    assert "siloweave prepare` first" in str(siloweave("export").exception)
    before = {path: path.read_bytes() for path in (tmp_path / "tiny").iterdir()}
    with another_command(tmp_path / "tiny") as other:
        for command in writing:
            found = siloweave(*command).exception
            assert isinstance(found, InputError), command
            assert f"`siloweave pretrain` (process {other.pid}" in str(found), command
        assert siloweave("status").exit_code == 0
        assert "is at work" not in str(siloweave("doctor").exception)
    assert {path: path.read_bytes() for path in (tmp_path / "tiny").iterdir()} == before
