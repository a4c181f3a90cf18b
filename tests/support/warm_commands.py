"""`siloweave` commands that are forked from a process in which their libraries are imported already.

A command spends half a second of processor time on imports, and one that loads a model four seconds; most tests look at
what it does after that. ``run`` and ``Popen`` are those of ``subprocess``: a command that a warm process can start just
as well comes from there, and all others are started as ever. What is forked is a child of the tests' process, with a
process id, a group, files, signals and an exit status of its own, and it runs the program's own file to its end.

What can't be the same gets no fork: another environment than the warm process had, but for `LATE`; other limits, masks
or users; another program; ``--debug``. Only the command line that ``ps`` shows is the warm process's, and strings are
hashed alike in all that it forks. So a test of starts, imports, command lines or hashes takes ``subprocess`` itself.
"""

import ctypes
import gc
import io
import json
import os
import re
import resource
import runpy
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from itertools import count, takewhile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

PROGRAM = str(Path(sys.executable).with_name("siloweave"))
# What a command reads when it runs, and neither it nor its libraries when they are imported.
LATE = re.compile(
    r"SILOWEAVE_(?!TEST_)\w+|XDG_STATE_HOME|RAY_ADDRESS|HTTPS_PROXY|NO_PROXY|no_proxy|AWS_\w+|COLUMNS|LINES"
    r"|PYTEST_CURRENT_TEST|PYTORCH_NVML_BASED_CUDA_CHECK"
)
# They load a model, and first of all have the libraries that they import be quiet; of a silo's service, which does not,
# the log lacks what these say.
WITH_MODELS = {"audit", "evaluate", "explain", "export", "federate", "generate", "merge", "optimise", "plan"}
WITH_MODELS |= {"predict", "prepare"}
_ENVIRONMENT = dict(os.environ)  # of the session, and not of the test that is the first to start a command
_STATE = ("Umask", "Uid", "Gid", "Groups", "SigBlk", "SigIgn", "CapEff", "CapBnd", "NoNewPrivs", "Cpus_allowed")
_LONGEST = 2**17  # bytes of a request; Linux takes a message of 208 KiB
_NAME, _SUBREAPER = 15, 36  # of prctl(2)
_LIBRARIES = {
    "plain": (
        "cluster.run",
        "cluster.monitoring.console",
        "dp_accounting.pld.privacy_loss_distribution",
        "federated.deployment.federation_status",
        "federated.deployment.silo_status",
        "privacy.certificate.check",
        "privacy.ledger.reconcile",
    ),
    "gangs": ("ray", "cluster.run", "cluster.monitoring.console", "cluster.runtime.gang"),
    "models": ("torch", "transformers.modeling_utils", "transformers.models.llama.modeling_llama", "peft"),
}
_OF_A_SCRIPT = {"__name__", "__package__", "__loader__", "__spec__", "__builtins__", "__cached__"}


# In the tests' process

_PARAMETERS = [
    *("args", "executable", "preexec_fn", "close_fds", "pass_fds", "cwd", "env", "startupinfo", "creationflags"),
    *("shell", "p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite", "restore_signals", "gid", "gids"),
    *("uid", "umask", "start_new_session", "process_group"),
]
# What a program may be started with, to be forked.
_USUAL = {"executable": None, "preexec_fn": None, "close_fds": True, "pass_fds": (), "shell": False} | {
    "restore_signals": True,
    "gid": None,
    "gids": None,
    "uid": None,
    "umask": -1,
    "process_group": -1,
}


class Popen(subprocess.Popen):
    """A process, forked from a warm one where that makes no difference."""

    def _execute_child(self, *values):
        given = dict(zip(_PARAMETERS, values, strict=True))
        place = os.path.abspath(os.fsdecode(given["cwd"] or "."))  # noqa: PTH100  # a link is not followed
        environment, kind = _environment(given["env"]), kind_of(given["args"], place)
        usual = all(given[name] == value for name, value in _USUAL.items()) and os.access(place, os.X_OK)
        warm = _warm(kind) if usual and kind else None
        if warm is None or warm.inherited != inherited(environment):
            super()._execute_child(*values)
            return
        ends = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        words, new_session = [os.fsdecode(word) for word in given["args"]], given["start_new_session"]
        request = {"words": words, "cwd": place, "environment": environment, "new_session": new_session}
        pid = warm.fork(request, [number if end == -1 else end for number, end in enumerate(ends)])
        if pid is None:
            super()._execute_child(*values)
            return
        self.pid = pid
        self._child_created = True
        self._close_pipe_fds(*values[10:16])


def run(*arguments: Any, input: Any = None, timeout: float | None = None, check: bool = False, **more: Any) -> Any:  # noqa: A002
    """``subprocess.run``."""
    if more.pop("capture_output", False):
        more |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if input is not None:
        more["stdin"] = subprocess.PIPE
    with Popen(*arguments, **more) as process:
        try:
            output, errors = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


def watched(*arguments: Any, **more: Any) -> psutil.Popen:
    """``psutil.Popen``, which makes a ``subprocess.Popen`` of its own."""
    with patch.object(subprocess, "Popen", Popen):
        return psutil.Popen(*arguments, **more)


def kind_of(arguments: Any, place: str) -> str | None:
    """Of which kind of warm process a command line is; None where none of them starts such a command."""
    words = [os.fsdecode(word) for word in arguments] if isinstance(arguments, list | tuple) else []
    if words[:1] == [PROGRAM]:
        given = words[1:]
    elif words[:3] == [sys.executable, "-m", "siloweave"] and not Path(place, "siloweave.py").exists():
        given = words[3:]
    else:
        return None
    if "--debug" in given:
        return None
    if given[:1] == ["pretrain"]:
        return "gangs"
    return "models" if given[:2] == ["silo", "serve"] or {*given[:1]} & WITH_MODELS else "plain"


def inherited(environment: dict[str, str]) -> dict[str, Any]:
    """What a process has from the one that starts it, but for directory, files and `LATE` names."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/thread-self/status").read_text().splitlines())
    limits = {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")}
    places = {
        name: str(Path("/proc/self", name).readlink()) for name in ("ns/mnt", "ns/net", "ns/pid", "ns/user", "root")
    }
    return {
        **{name: status[name] for name in _STATE},
        **limits,
        **places,
        "nice": os.nice(0),
        "environment": {name: value for name, value in environment.items() if not LATE.fullmatch(name)},
    }


def _environment(given: Any) -> dict[str, str]:
    """What a program gets; where none is given, more than ``os.environ`` knows: readline has set COLUMNS, too."""
    if given is not None:
        return {os.fsdecode(name): os.fsdecode(value) for name, value in given.items()}
    pointers = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
    pairs = takewhile(bool, (pointers[n] for n in count()))
    return dict(os.fsdecode(pair).split("=", 1) for pair in pairs)


class Warm:
    """A process of this one's, which forks what is to be this one's children."""

    def __init__(self, kind: str) -> None:
        self.inherited = inherited(_ENVIRONMENT)
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._one = threading.Lock()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, __file__, kind, str(theirs.fileno())],
                env=_ENVIRONMENT,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def fork(self, request: dict[str, Any], files: list[int]) -> int | None:
        """Its process id, once it is a child of this process; None where the warm process has forked none.

        That is so where it has just been killed, or the request is longer than `_LONGEST`. The process between the two
        holds the other end of the line until it has told the id, whatever has become of the warm process.
        """
        message, pid = json.dumps(request).encode(), b""
        if len(message) > _LONGEST:
            return None
        with self._one, _parent_of_orphans(), suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self._requests, [message], files)
            pid = self._requests.recv(100)
            self._requests.recv(100)  # nothing, where the warm process has ended: both have let go of the line by then
        if pid:
            return int(pid)
        assert self.process.wait() < 0, f"the warm process has ended with status {self.process.returncode}"
        return None


_running: dict[str, Warm] = {}


def _warm(kind: str) -> Warm:
    """That of this process. One that was started while a Ray of our own was up has ended with that."""
    if kind not in _running or _running[kind].process.poll() is not None:
        _running[kind] = Warm(kind)
    return _running[kind]


@contextmanager
def _parent_of_orphans():
    """Inside the context, a descendant whose parent ends becomes this process's child, and not that of process 1."""
    _prctl(_SUBREAPER, 1)
    try:
        yield
    finally:
        _prctl(_SUBREAPER, 0)


def _prctl(option: int, value: Any) -> None:
    done = ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
    assert done == 0, os.strerror(ctypes.get_errno())


# In the warm process


def warm_up(kind: str) -> None:
    """Imports what commands of a kind do, and has the garbage collector leave that alone."""
    import siloweave  # noqa: F401
    from cluster.commands.stages import quiet_libraries
    from cluster.runtime import session
    from configs.imports import import_large

    if kind != "plain":
        quiet_libraries()
        os.environ.update(session._ENVIRONMENT)  # Ray reads it at its import
    import_large(*_LIBRARIES[kind])
    gc.freeze()


def serve(requests: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Forks for each request. Returns in those that are forked alone, with what is asked of them and their files."""
    while True:
        message, files, _, _ = socket.recv_fds(requests, _LONGEST, 3)
        if not message:
            os._exit(0)  # the tests have ended
        assert len(list(Path("/proc/self/task").iterdir())) == 1, "a library has started a thread, which no fork has"
        between = os.fork()
        if between == 0:
            between, forked = os.getpid(), os.fork()
            if forked == 0:
                while os.getppid() == between:
                    time.sleep(0.0002)
                return json.loads(message), files
            requests.send(str(forked).encode())
            os._exit(0)
        os.waitpid(between, 0)
        requests.send(b"an orphan no more")
        for file in files:
            os.close(file)


def become(request: dict[str, Any], files: list[int]) -> None:
    """Makes this process what one is that has just been started."""
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.closerange(3, 2**16)
    if request["new_session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    _prctl(_NAME, Path(request["words"][0]).name.encode())
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = _stream(number, getattr(sys, name))
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    threading.main_thread()._set_native_id()
    numpy = sys.modules.get("numpy")
    if numpy and "numpy.random" in sys.modules:
        numpy.random.seed()  # Python's own numbers are other ones after each fork


def _stream(number: int, like: io.TextIOWrapper) -> io.TextIOWrapper:
    """Standard input or output as Python makes it at its start (create_stdio, in its pylifecycle.c)."""
    unbuffered = like.write_through  # by PYTHONUNBUFFERED
    binary: Any = open(number, "rb" if number == 0 else "wb", 0 if unbuffered and number else -1, closefd=False)  # noqa: SIM115
    raw = getattr(binary, "raw", binary)
    raw.name = like.name
    lines = not unbuffered and (raw.isatty() or number == 2)
    stream = io.TextIOWrapper(binary, like.encoding, like.errors, "\n", lines, unbuffered)
    stream.mode = like.mode
    return stream


def execute(words: list[str]) -> None:
    """Runs a command's file, in the module that is this process's first one."""
    first = sys.modules["__main__"].__dict__
    sys.orig_argv[:] = words if words[0] == sys.executable else [sys.executable, *words]
    if words[0] == sys.executable:
        sys.argv[:] = words[2:]
        sys.path.insert(0, str(Path.cwd()))
        run_module = runpy._run_module_as_main  # what `python -m` calls
        run_module(words[2])
        return
    sys.argv[:] = words
    sys.path.insert(0, str(Path(words[0]).parent))
    code = compile(Path(words[0]).read_bytes(), words[0], "exec")
    for name in set(first) - _OF_A_SCRIPT:
        del first[name]
    first.update(__file__=words[0], __doc__=None, __annotations__={})
    exec(code, first)


if __name__ == "__main__":
    del sys.path[0]
    warm_up(sys.argv[1])
    _asked, _files = serve(socket.socket(fileno=int(sys.argv[2])))
    become(_asked, _files)
    execute(_asked["words"])
