"""The supervisor, over real processes: order, restarts, leftovers, a clean end."""

import json
import os
import signal
import sys
import threading
import time

import psutil
import pytest

from configs.errors import InputError, SiloweaveError
from federated.deployment.supervisor import (
    STATE,
    Program,
    Supervisor,
    alone,
    end_leftovers,
    find_process,
    read_state,
    stop,
)

SLEEPER = "import time; print('up', flush=True); time.sleep(600)"
PARENT = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).wait()"


def program(name, script=SLEEPER, is_healthy=lambda: True):
    return Program(name, (sys.executable, "-c", script), dict(os.environ), is_healthy)


class Running:
    """A supervisor in a thread."""

    def __init__(self, folder, *programs):
        self.folder, self.ended, self.ready = folder, threading.Event(), threading.Event()
        self.ticks = 0
        self.thread = threading.Thread(target=self._run, args=(Supervisor(folder, programs),))
        self.thread.start()
        assert self.ready.wait(300)

    def _run(self, supervisor):
        supervisor.run(self.ended, self.ready.set, self._tick)

    def _tick(self):
        self.ticks += 1

    def state(self):
        return json.loads((self.folder / STATE).read_text())["programs"]

    def pid(self, name):
        return self.state()[name]["process"]["pid"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join(300)
        assert not self.thread.is_alive()


def wait_until(holds, timeout_s=300):
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_what_dies_is_restarted_and_all_ends_with_the_supervisor(tmp_path):
    with Running(tmp_path, program("first"), program("second", PARENT)) as running:
        first, second = psutil.Process(running.pid("first")), psutil.Process(running.pid("second"))
        wait_until(second.children)
        grandchild = second.children()[0]
        os.kill(first.pid, signal.SIGKILL)
        wait_until(lambda: running.state()["first"]["restarts"] == 1 and running.state()["first"]["process"])
        assert running.state()["first"]["last_exit"] == -signal.SIGKILL
        assert running.pid("first") != first.pid
        assert running.pid("second") == second.pid
        assert running.ticks
        left = [psutil.Process(running.pid("first")), second, grandchild]
    assert not [process for process in left if process.is_running()]
    assert not (tmp_path / STATE).exists()
    assert (tmp_path / "first.log").read_text() == "up\nup\n"


def test_a_process_that_lives_and_is_not_healthy_is_restarted(tmp_path, monkeypatch):
    import federated.deployment.supervisor as module

    monkeypatch.setattr(module, "HANG_S", 1.0)
    healthy = threading.Event()
    healthy.set()
    with Running(tmp_path, program("hangs", is_healthy=healthy.is_set)) as running:
        pid = running.pid("hangs")
        monkeypatch.setattr(module, "HEALTH_S", 0.1)
        healthy.clear()
        wait_until(lambda: running.state()["hangs"]["restarts"] >= 1)
        assert not psutil.pid_exists(pid)
        healthy.set()
        wait_until(lambda: running.state()["hangs"]["healthy"])


def test_a_first_start_that_fails_says_why_and_leaves_nothing(tmp_path):
    before = set(psutil.Process().children(recursive=True))  # a session's Ray is among them
    fails = program("fails", "raise SystemExit('port 80 is taken')", lambda: False)
    supervisor = Supervisor(tmp_path, [program("first"), fails])
    with pytest.raises(SiloweaveError, match=r"fails did not start: port 80 is taken; see .*fails.log"):
        supervisor.run(threading.Event(), lambda: None, lambda: None)
    left = set(psutil.Process().children(recursive=True)) - before
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]


def test_two_supervisors_do_not_share_a_folder(tmp_path):
    with Running(tmp_path, program("first")), pytest.raises(InputError, match="another process runs there already"):
        Supervisor(tmp_path, [program("second")]).run(threading.Event(), lambda: None, lambda: None)


def test_a_killed_supervisors_processes_are_ended_by_the_next_start(tmp_path):
    code = (
        "import sys, os, threading; from pathlib import Path\n"
        "from federated.deployment.supervisor import Program, Supervisor\n"
        f"p = Program('orphan', (sys.executable, '-c', {SLEEPER!r}), dict(os.environ), lambda: True)\n"
        "Supervisor(Path(sys.argv[1]), [p]).run(threading.Event(), lambda: print('ready', flush=True), lambda: None)"
    )
    supervisor = psutil.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=-1)
    assert supervisor.stdout.readline() == b"ready\n"
    orphan = find_process(json.loads((tmp_path / STATE).read_text())["programs"]["orphan"]["process"])
    supervisor.kill()
    supervisor.wait()
    assert orphan.is_running()
    assert read_state(tmp_path) is None  # nobody supervises
    with alone(tmp_path):
        end_leftovers(tmp_path)
    assert not orphan.is_running()


def test_stop_ends_a_supervisor_that_nobody_reaps(tmp_path):
    code = (
        "import sys, os; from pathlib import Path; from federated.deployment.supervisor import Program, Supervisor\n"
        "from federated.deployment.supervisor import ended_by_signal\n"
        f"p = Program('child', (sys.executable, '-c', {SLEEPER!r}), dict(os.environ), lambda: True)\n"
        "ready = lambda: print('ready', flush=True)\n"
        "Supervisor(Path(sys.argv[1]), [p]).run(ended_by_signal(), ready, lambda: None)"
    )
    supervisor = psutil.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=-1)
    assert supervisor.stdout.readline() == b"ready\n"
    child = find_process(json.loads((tmp_path / STATE).read_text())["programs"]["child"]["process"])
    assert stop(tmp_path) is True
    assert supervisor.status() == psutil.STATUS_ZOMBIE
    assert not child.is_running()
    assert supervisor.wait() == 0


def test_stop_reaches_the_supervisor_and_not_another_process_of_its_number(tmp_path):
    assert stop(tmp_path) is False
    own = {"pid": os.getpid(), "created": 1.0}  # our number, another start
    (tmp_path / STATE).write_text(json.dumps({"supervisor": own, "programs": {}}))
    assert stop(tmp_path) is False
