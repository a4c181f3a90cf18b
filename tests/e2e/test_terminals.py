"""Where a command's words go: a full disk, a closed pipe, an encoding with few signs. Through the installed program."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from configs.load import load
from configs.parse import to_toml

SILOWEAVE = Path(sys.executable).with_name("siloweave")
STRANGE = b"no\x1b[2J\xff\xe5\x90\x8d.run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder that has settings and nothing else."""
    folder = tmp_path_factory.mktemp("runs") / "r"
    folder.mkdir()
    (folder / "config.toml").write_text(to_toml(load("tiny")))
    return folder


def ended(*arguments, shell='exec "$@"', **environment):
    """A command, its streams as a shell gives them."""
    return subprocess.run(
        ["sh", "-c", shell, "sh", SILOWEAVE, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("shell", "options", "why"),
    [
        ('exec "$@" > /dev/full', (), "No space left on device"),
        ('exec "$@" > /dev/full', ("--json",), "No space left on device"),
        ('exec "$@" >&-', (), "Bad file descriptor"),
    ],
)
def test_a_result_that_nobody_gets_is_a_failure_in_one_line(run, shell, options, why):
    """Before: a traceback with --json, an AttributeError where standard output was closed."""
    done = ended("status", run, *options, shell=shell)
    told = f"error: standard output can't be written ({why}); give a terminal, or a file with room\n"
    assert (done.returncode, done.stderr.decode()) == (1, told)


@pytest.mark.parametrize("shell", ['exec "$@" 2> /dev/full', 'exec "$@" 2>&-'])
def test_an_error_that_nobody_reads_has_its_status(tmp_path, shell):
    done = ended("status", tmp_path, shell=shell)
    assert (done.returncode, done.stdout) == (2, b"")


def test_a_reader_that_has_seen_enough_gets_no_traceback(run):
    done = ended("status", run, shell='"$@" | head -n 1')
    assert done.stdout.decode().startswith("tiny in ")
    assert done.stdout.count(b"\n") == 1
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", rb"no\x1b[2J\udcff\u540d.run"), ("latin-1", rb"no\x1b[2J\udcff\u540d.run"), ("utf-8", None)],
)
def test_what_an_encoding_has_no_sign_for_is_escaped(tmp_path, encoding, shown):
    """Bytes in a name that are no text, signs of another script, and a sequence that would clear the screen."""
    shown = shown or "no\\x1b[2J\\udcff名.run".encode()
    done = ended("status", STRANGE, PYTHONIOENCODING=encoding, LC_ALL="C")
    assert done.returncode == 2
    assert done.stderr == b"error: " + shown + b": no run here; give a run's directory, or its configuration with -c\n"
    usage = ended("status", b"--" + STRANGE, PYTHONIOENCODING=encoding, LC_ALL="C")
    assert usage.returncode == 2
    assert rb"\x1b[2J" in usage.stderr and b"\x1b[2J" not in usage.stderr
    assert b"Traceback" not in usage.stderr


def test_sigterm_ends_a_command_in_one_line(run):
    following = subprocess.Popen([SILOWEAVE, "status", run, "--follow"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    following.stdout.readline()
    following.send_signal(signal.SIGTERM)
    assert following.communicate(timeout=300)[1] == b"ended by SIGTERM; what was committed is kept\n"
    assert following.returncode == 143
