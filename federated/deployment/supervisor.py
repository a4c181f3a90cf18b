"""One small supervisor: starts processes in order, waits for their health, restarts what dies, stops all of it.

It keeps SuperLink and proxy running at the coordinator, and the SuperNode at a silo. Where systemd is there it keeps
the supervisor alive; where it is not, a killed supervisor's processes are ended by the next start.
"""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from configs.errors import InputError, SiloweaveError
from configs.locks import HeldError, locked
from configs.parse import json_object, reading
from configs.storage.files import write_atomic
from federated.deployment.ports import check_free

STATE = "processes.json"
POLL_S, HEALTH_S = 0.5, 5.0
START_S, END_S = 90.0, 10.0
HANG_S = 60.0  # a process that lives and is not healthy for so long is restarted, too
LONGEST_BACKOFF_S, QUIET_S = 30.0, 60.0


@dataclass(frozen=True)
class Program:
    """A process to keep running.

    Attributes:
        name: names its log and its line in a status.
        command: what is run.
        environment: all of it; nothing is inherited.
        is_healthy: whether it does its work.
        listens: hosts and ports that must be free before anything starts.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    is_healthy: Callable[[], bool]
    listens: tuple[tuple[str, int], ...] = ()


@dataclass
class Child:
    """A program with its process of the moment."""

    program: Program
    log: Path
    process: psutil.Popen | None = None
    restarts: int = 0
    last_exit: int | None = None
    healthy: bool = False
    _failures: int = 0
    _started: float = 0.0
    _seen_healthy: float = 0.0
    _checked: float = 0.0
    _not_before: float = 0.0

    def start(self) -> None:
        """Starts the process; its output is appended to its log."""
        with self.log.open("ab") as log:
            self.process = psutil.Popen(
                list(self.program.command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(self.program.environment),
                cwd=self.log.parent,
                # Ctrl-C at a terminal reaches the supervisor alone, which stops its processes in order.
                start_new_session=True,
            )
        self._started = self._seen_healthy = time.monotonic()
        self.healthy, self._checked = False, 0.0

    def wait_healthy(self, ended: threading.Event) -> None:
        """Waits for a first start.

        Raises:
            SiloweaveError: it ended, or was not healthy in time.
        """
        deadline = time.monotonic() + START_S
        while not ended.is_set() and not self._check():
            if self.process is None or self.process.poll() is not None or time.monotonic() > deadline:
                raise SiloweaveError(f"{self.program.name} did not start: {last_line(self.log)}; see {self.log}")
            time.sleep(POLL_S / 2)

    def watch(self) -> None:
        """Restarts the process where it died or hangs, later and later while that goes on."""
        now = time.monotonic()
        if self.process is None:
            if now >= self._not_before:
                self.restarts += 1
                self.start()
        elif self.process.poll() is not None:
            self._fail(now)
        elif now - self._checked >= HEALTH_S or not self.healthy:
            if self._check():
                self._failures = 0 if now - self._started > QUIET_S else self._failures
            elif now - self._seen_healthy > HANG_S:
                end_tree([self.process], grace_s=END_S)
                self._fail(now)

    def _check(self) -> bool:
        self.healthy, self._checked = self.program.is_healthy(), time.monotonic()
        if self.healthy:
            self._seen_healthy = self._checked
        return self.healthy

    def _fail(self, now: float) -> None:
        if self.process is not None:
            self.last_exit = self.process.poll()
        self.process, self.healthy = None, False
        self._not_before = now + min(2.0**self._failures, LONGEST_BACKOFF_S)
        self._failures += 1

    def describe(self) -> dict[str, Any]:
        """What the state file says of this process."""
        running = None if self.process is None else {"pid": self.process.pid, "created": self.process.create_time()}
        return {
            "process": running,
            "healthy": self.healthy,
            "restarts": self.restarts,
            "last_exit": self.last_exit,
            "log": str(self.log),
        }


@dataclass
class Supervisor:
    """Keeps programs running until it is told to end.

    Attributes:
        folder: receives the state file and the logs.
        programs: in the order in which they start; they stop in the opposite order.
    """

    folder: Path
    programs: Sequence[Program]
    _written: bytes = field(default=b"", init=False)

    def run(self, ended: threading.Event, ready: Callable[[], None], tick: Callable[[], None]) -> None:
        """Runs until ``ended`` is set.

        Args:
            ended: tells it to stop.
            ready: called once, when all are healthy.
            tick: called twice a second from then on.

        Raises:
            InputError: another one runs in this folder, or a port is taken.
            SiloweaveError: a program did not start.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with alone(self.folder):
            end_leftovers(self.folder)
            for program in self.programs:
                for host, port in program.listens:
                    check_free(host, port)
            children = [Child(program, self.folder / f"{program.name}.log") for program in self.programs]
            try:
                for child in children:
                    child.start()
                    self._write(children)
                    child.wait_healthy(ended)
                self._write(children)
                if not ended.is_set():
                    ready()
                while not ended.wait(POLL_S):
                    for child in children:
                        child.watch()
                    self._write(children)
                    tick()
            finally:
                for child in reversed(children):
                    if child.process is not None:
                        end_tree([child.process], grace_s=END_S)
                (self.folder / STATE).unlink(missing_ok=True)

    def _write(self, children: Sequence[Child]) -> None:
        own = {"pid": os.getpid(), "created": psutil.Process().create_time()}
        programs = {child.program.name: child.describe() for child in children}
        content = json.dumps({"supervisor": own, "programs": programs}, indent=2).encode()
        if content != self._written:
            write_atomic(self.folder / STATE, content, mode=0o600)
            self._written = content


def read_state(folder: Path) -> dict[str, Any] | None:
    """What a supervisor says of its processes; None where none runs."""
    path = folder / STATE
    if not path.exists():
        return None
    with reading(path, "delete it if nothing runs there"):
        try:
            state = json_object(path.read_bytes(), str(path))
        except FileNotFoundError:  # it has ended meanwhile
            return None
        for program in state["programs"].values():
            program["healthy"], program["restarts"], program["process"]  # are shown: what lacks them is not ours
        return state if find_process(state["supervisor"]) else None


def stop(folder: Path) -> bool:
    """Tells a supervisor to end and waits until it has; False where none ran.

    Raises:
        SiloweaveError: it did not end in time.
    """
    state = read_state(folder)
    process = find_process(state["supervisor"]) if state else None
    if state is None or process is None:
        return False
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 2 * END_S * (1 + len(state["programs"]))
    while find_process(state["supervisor"]):  # not Process.wait: it would wait for whoever started it to reap it
        if time.monotonic() > deadline:
            raise SiloweaveError(f"{folder}: process {process.pid} did not end; look at it, then kill it")
        time.sleep(POLL_S / 5)
    return True


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds the folder's lock.

    Raises:
        InputError: another process holds it.
    """
    try:
        with locked(folder / "lock", b""):
            yield
    except HeldError:
        raise InputError(f"{folder}: another process runs there already; stop it first") from None


def end_leftovers(folder: Path) -> None:
    """Ends the processes of a supervisor that was killed: they hold its ports."""
    path = folder / STATE
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        programs = json.loads(path.read_bytes())["programs"].values()
        found = [find_process(program["process"]) for program in programs if program["process"]]
        end_tree([process for process in found if process], grace_s=END_S)


def find_process(described: Mapping[str, Any]) -> psutil.Process | None:
    """The process that was described, unless another one has its number by now."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(described["pid"])
        if abs(process.create_time() - described["created"]) < 1 and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def end_tree(processes: Sequence[psutil.Process], grace_s: float) -> None:
    """Ends processes and all that they started: asked first, killed after the grace time."""
    tree = list(processes)
    for process in processes:  # read before anything ends: some of Flower's processes have sessions of their own
        with contextlib.suppress(psutil.Error):
            tree.extend(process.children(recursive=True))
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    psutil.wait_procs(processes, timeout=grace_s)
    left = [process for process in tree if process.is_running()]
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    for process in psutil.wait_procs(left, timeout=grace_s)[1]:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=grace_s)


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    with contextlib.suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace")[-4000:].splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "its log is empty")
    return "it has no log"


def ended_by_signal() -> threading.Event:
    """Is set by SIGTERM and Ctrl-C."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    return ended
