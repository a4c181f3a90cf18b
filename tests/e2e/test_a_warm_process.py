"""A command that is forked from a warm process is what one is that was started: the same state, words and status."""

import json
import os
import pty
import re
import signal
import subprocess
import sys

import psutil
import pytest
import warm_commands

# All that a program can know of itself, but for what the first line of `warm_commands` names.
LIBRARIES = f"""
from configs.imports import import_large
import siloweave
import_large(*{warm_commands._LIBRARIES["plain"]})
del import_large, siloweave
"""
TELL = """
import atexit, gc, io, json, locale, logging, os, random, resource, signal, sys, threading, warnings
main = sys.modules["__main__"]
streams = [sys.stdin, sys.stdout, sys.stderr]
names = ("name", "mode", "encoding", "errors", "line_buffering", "write_through", "newlines")
told = {
    "argv": sys.argv, "orig_argv": sys.orig_argv, "path": sys.path, "flags": str(sys.flags), "x": sys._xoptions,
    "executable": [sys.executable, sys.prefix, sys.base_prefix], "warnoptions": sys.warnoptions,
    "main": {name: str(value) for name, value in vars(main).items() if name not in ("__builtins__", "__loader__")
             and name not in ("main", "told", "streams", "names") and not hasattr(value, "__spec__")},
    "environment": dict(os.environ), "cwd": os.getcwd(), "parent": os.getppid(), "umask": os.umask(0o22),
    "group": os.getpgrp() == os.getpid(), "session": os.getsid(0) == os.getpid(),
    "groups": [os.getpgrp(), os.getsid(0)],
    "ids": [os.getresuid(), os.getresgid(), os.getgroups()], "nice": os.nice(0),
    "limits": {n: resource.getrlimit(getattr(resource, n)) for n in dir(resource) if n.startswith("RLIMIT")},
    "signals": {str(n): str(signal.getsignal(n)).split(" at ")[0] for n in sorted(signal.valid_signals())},
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), "timer": signal.getitimer(signal.ITIMER_REAL),
    "wakeup": signal.set_wakeup_fd(-1), "sigint": sys.getswitchinterval(), "recursion": sys.getrecursionlimit(),
    "files": {n: os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if int(n) < 3},
    "more_files": len(os.listdir("/proc/self/fd")), "inheritable": [os.get_inheritable(n) for n in range(3)],
    "streams": [{name: getattr(s, name, None) for name in names} for s in streams],
    "ttys": [[s.isatty(), s.fileno(), type(s.buffer).__name__] for s in streams],
    "originals": streams == [sys.__stdin__, sys.__stdout__, sys.__stderr__],
    "raw": [[getattr(getattr(s.buffer, "raw", s.buffer), a) for a in ("name", "mode", "closefd")] for s in streams],
    "locale": [locale.setlocale(locale.LC_ALL), locale.getpreferredencoding(False), sys.getfilesystemencoding()],
    "threads": [[t.name, t.native_id == os.getpid()] for t in threading.enumerate()], "gc": [gc.isenabled(),
    gc.get_threshold()], "warnings": [str(f) for f in warnings.filters], "handlers": str(logging.getLogger().handlers),
    "level": logging.getLogger().level, "hooks": [sys.excepthook is sys.__excepthook__, str(sys.gettrace())],
    "comm": open("/proc/self/comm").read(), "read": sys.stdin.read(),
}
atexit.register(lambda: print("at the end", file=sys.stderr))
print(json.dumps(told))
"""


def script(path, body):
    path.write_text(f"#!{sys.executable}\n{body}")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Makes a script what the warm process takes for the installed program."""

    def make(body, name="siloweave"):
        monkeypatch.setattr(warm_commands, "PROGRAM", script(tmp_path / name, body))
        return warm_commands.PROGRAM

    return make


@pytest.fixture
def forks(monkeypatch):
    """How many commands a warm process has forked."""
    forked, fork = [], warm_commands.Warm.fork

    def counted(self, request, files):
        pid = fork(self, request, files)
        forked.extend([pid] if pid else [])
        return pid

    monkeypatch.setattr(warm_commands.Warm, "fork", counted)
    return forked


def both(command, forks, **given):
    """A command as it is started and as it is forked."""
    started = subprocess.run(command, capture_output=True, check=False, timeout=300, **given)
    assert not forks
    forked = warm_commands.run(command, capture_output=True, check=False, timeout=300, **given)
    assert len(forks) == 1
    return started, forked


@pytest.mark.parametrize("way", [{}, {"start_new_session": True}, {"more": {"SILOWEAVE_CACHE": "ö"}}])
def test_a_forked_program_finds_the_state_of_one_that_was_started(program, forks, tmp_path, way):
    way = {"env": {**os.environ, **way["more"]}} if "more" in way else way
    (tmp_path / "elsewhere").mkdir()
    command = [program(LIBRARIES + TELL), "a", "b c", "ö\udcff"]
    started, forked = both(command, forks, cwd=tmp_path / "elsewhere", input=b"said\n\xc3\xb6", **way)
    assert started.returncode == forked.returncode == 0, (started.stderr, forked.stderr)
    assert started.stderr == forked.stderr == b"at the end\n"
    expected, found = (json.loads(done.stdout) for done in (started, forked))
    for told in (expected, found):
        assert told["groups"][0] in (os.getpgrp(), None) or way
        told["groups"] = told["files"] = None  # other pipes, and the new session's own number
    assert {name: (found[name], told) for name, told in expected.items() if found[name] != told} == {}
    assert (found["parent"], found["argv"][1:]) == (os.getpid(), command[1:])


def test_a_module_in_the_folder_where_it_is_asked_for_comes_first(forks, tmp_path):
    (tmp_path / "siloweave.py").write_text("print('mine')")
    done = warm_commands.run([sys.executable, "-m", "siloweave"], cwd=tmp_path, capture_output=True)
    assert (done.stdout, forks) == (b"mine\n", [])


ENDS = {
    "words": "raise SystemExit('words')",
    "status": "import sys; print('half', end=''); sys.exit(7)",
    "error": "import os; os.write(1, b'x'); raise ValueError('no')",
    "interrupted": "raise KeyboardInterrupt",
    "killed": "import os, signal; print('lost', end=''); os.kill(os.getpid(), signal.SIGKILL)",
    "terminated": "import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(300)",
    "at once": "import os; print('lost', end=''); os._exit(9)",
    "full": "import sys; sys.stdout = open('/dev/full', 'w'); print('no room')",
    "aborted": "import os; os.abort()",
    "thread": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()",
    "exit hook": "import atexit; atexit.register(int, 'x')",
}


@pytest.mark.parametrize("how", ENDS)
def test_a_forked_program_ends_as_one_that_was_started(program, forks, how):
    started, forked = both([program(ENDS[how])], forks)
    # A warm process's own lines stand above those of the program in a traceback.
    ours = [line for line in started.stderr.splitlines() if not line.startswith((b"  File", b"    "))]
    theirs = [line for line in forked.stderr.splitlines() if not line.startswith((b"  File", b"    "))]
    assert (forked.returncode, forked.stdout, theirs) == (started.returncode, started.stdout, ours)


def test_numbers_that_are_drawn_are_other_ones_in_each_fork(program, forks):
    draw = "import random, uuid, os, numpy\nprint(random.random(), uuid.uuid4(), os.urandom(16).hex(), end=' ')"
    draw += "\nprint(numpy.random.random())"
    command = [program(draw), "predict"]
    said = {warm_commands.run(command, capture_output=True, check=True, text=True).stdout for _ in range(3)}
    assert len(said) == len(forks) == 3
    assert all(len({line.split()[n] for line in said}) == 3 for n in range(4))


def test_a_fork_is_a_child_that_signals_reach_and_that_leaves_nothing(program, forks):
    body = "import signal, sys\nprint('up', flush=True)\nsignal.sigwait([signal.SIGUSR1])\nprint('told')"
    with warm_commands.Popen([program(body)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        assert process.poll() is None
        assert process.pid == forks[0] in [child.pid for child in psutil.Process().children()]
        process.send_signal(signal.SIGUSR1)
        assert process.wait(300) == -signal.SIGUSR1 or process.returncode == 0
    with warm_commands.Popen([program(body)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.kill()
        assert process.wait(300) == -signal.SIGKILL
    assert not {child.pid for child in psutil.Process().children(recursive=True)} & set(forks)


def test_a_terminal_is_one_to_a_fork(program, forks):
    found = []
    for start in (subprocess.Popen, warm_commands.Popen):
        ours, theirs = pty.openpty()
        with start([program(LIBRARIES + TELL)], stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs) as process:
            os.close(theirs)
            said = b""
            while b"at the end" not in said:
                said += os.read(ours, 10**5)
            assert process.wait(300) == 0
        os.close(ours)
        told = json.loads(said.splitlines()[0])
        assert [tty for tty, *_ in told["ttys"]] == [False, True, True]
        found.append({**told, "files": None})
    assert found[0] == found[1]
    assert len(forks) == 1


@pytest.mark.parametrize(
    "given",
    [
        {"env": {**os.environ, "OMP_NUM_THREADS": "2"}},
        {"env": {**os.environ, "SILOWEAVE_TEST_HOLD": "x"}},
        {"env": {**os.environ, **{f"SILOWEAVE_{n}": "x" * 2**16 for n in range(8)}}},  # more than a message holds
        {"env": {}},
        {"preexec_fn": lambda: None},
        {"pass_fds": (0,)},
        {"umask": 0o77},
        {"close_fds": False},
    ],
)
def test_what_would_differ_is_started(program, forks, given):
    assert warm_commands.run([program("")], **given).returncode == 0
    assert not forks


def test_another_mask_of_files_or_another_limit_is_a_start(program, forks):
    import resource

    command, before, files = [program("")], os.umask(0o77), resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        assert warm_commands.run(command).returncode == 0
        os.umask(before)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files[0] - 1, files[1]))
        assert warm_commands.run(command).returncode == 0
    finally:
        os.umask(before)
        resource.setrlimit(resource.RLIMIT_NOFILE, files)
    assert not forks
    assert warm_commands.run([*command, "--debug"]).returncode == 0
    assert not forks
    assert warm_commands.run(command).returncode == 0
    assert len(forks) == 1


def test_what_is_not_there_is_told_as_ever(program, forks, tmp_path):
    with pytest.raises(FileNotFoundError):
        warm_commands.run([program("")], cwd=tmp_path / "nowhere")
    with pytest.raises(subprocess.TimeoutExpired):
        warm_commands.run([program("import time; time.sleep(300)")], timeout=0.5)
    with pytest.raises(subprocess.CalledProcessError):
        warm_commands.run([program("raise SystemExit(3)")], check=True)
    assert len(forks) == 2
    assert not {child.pid for child in psutil.Process().children()} & set(forks)


def test_a_warm_process_that_was_ended_is_followed_by_another(program, forks, monkeypatch):
    command = [program("print('up')")]

    def is_up():
        return warm_commands.run(command, capture_output=True).stdout == b"up\n"

    assert is_up()
    warm_commands._running["plain"].process.kill()
    warm_commands._running["plain"].process.wait(300)
    assert is_up()
    assert len(forks) == 2
    # One that ends between the look at it and its answer has forked nothing, and the command is started.
    process, send = warm_commands._running["plain"].process, warm_commands.socket.send_fds
    monkeypatch.setattr(process, "poll", lambda: None)
    process.send_signal(signal.SIGSTOP)

    def killed_by_then(*given):
        send(*given)
        process.kill()
        process.wait(300)

    with monkeypatch.context() as patched:
        patched.setattr(warm_commands.socket, "send_fds", killed_by_then)
        assert is_up()
    assert is_up()
    assert len(forks) == 2


AGE = re.compile(r'"(last_commit_)?age_s": [0-9.]+')


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["status", "RUN", "--json"],
        ["status", "nowhere"],
        ["no-such-command"],
        ["ledger", "show", "RUN/state", "--json"],
        ["predict", "RUN", "-c", "RUN/config.toml", "--input", "in.jsonl", "--output", "out.jsonl"],
        ["audit", "-c", "tiny", "--canaries", "3", "--json"],
    ],
)
def test_commands_say_the_same_both_ways(tiny_run, forks, tmp_path, words):
    (tmp_path / "in.jsonl").write_text('{"text": "What is"}\n')
    told = []
    program = [sys.executable, "-m", "siloweave"] if words[-1] == "--help" else [warm_commands.PROGRAM]
    for way in (subprocess.run, warm_commands.run):
        command = [*program, *(word.replace("RUN", str(tiny_run.directory)) for word in words)]
        narrow = {**os.environ, "COLUMNS": "60"}
        done = way(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=narrow)
        output = tmp_path / "out.jsonl"
        said = AGE.sub("", done.stdout)  # how long ago something was: one of the two comes later
        told.append((said, done.stderr, done.returncode, output.read_text() if output.exists() else None))
        output.unlink(missing_ok=True)
    assert told[0] == told[1]
    assert len(forks) == 1
