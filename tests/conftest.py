"""One tiny run a session: the whole pipeline through the real command line, shared by every test that needs a model."""

import fcntl
import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import same_everywhere  # noqa: F401  # before what reads the environment at its import
import warm_commands
from hypothesis import HealthCheck, settings
from installed import install, outside_the_checkout

from configs.imports import uncollected
from configs.load import load
from configs.schema.schema import RunConfig

# The same examples in every session, and none judged by the clock: a test that has passed passes again, until it or
# what it tests is changed.
settings.register_profile("certain", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("certain")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Thousands of tests and what they import stay to the end: Python need not look for garbage among them.

    Commands find the environment that a user's do: without what libraries put there at their imports.
    """
    before = dict(os.environ)
    with uncollected():
        collected = yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    return collected


def pytest_collection_modifyitems(items):
    """The first process makes the tiny run, which takes two minutes; what needs none is done meanwhile.

    Files of `unit/` stay last: they are short, and fill what is left at the end.
    """
    waiting = {item.path for item in items if "tiny_run" in item.fixturenames}
    maker = next((item.path for item in items if item.path in waiting), None)
    unit = Path(__file__).with_name("unit")

    def turn(item):
        is_unit = item.path.is_relative_to(unit)
        return is_unit, not is_unit and item.path != maker and item.path in waiting

    items.sort(key=turn)


_USERS = count()


@pytest.fixture(autouse=True)
def own_state(tmp_path_factory, monkeypatch):
    """Each test is a user of its own: no ledger of another test, or of who runs the tests, is found.

    Most tests write nothing, and have no folder: to find a free name for one takes longer the more there are.
    """
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / "users" / str(next(_USERS))))


def run_siloweave(
    *arguments: str, cwd: Path, timeout_s: float = 600, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The installed command, as a user would run it; from a warm process where that makes no difference."""
    return warm_commands.run(
        [warm_commands.PROGRAM, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@pytest.fixture(scope="session")
def siloweave():
    return run_siloweave


@pytest.fixture
def hidden(tmp_path):
    """A PYTHONPATH under which a package fails to import, as if it were not installed."""

    def hide(package: str) -> str:
        folder = tmp_path / "hidden" / package
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(f"raise ImportError('No module named {package}')")
        return f"{tmp_path / 'hidden'}:{os.environ.get('PYTHONPATH', '')}"

    return hide


@dataclass(frozen=True)
class TinyRun:
    """A finished `siloweave demo -c tiny`, given in an empty folder, with the programs that were installed for it.

    Its user's state is in the folder, too.
    """

    root: Path
    directory: Path
    report: dict[str, Any]
    stderr: str
    programs: Path

    @property
    def model(self) -> Path:
        return self.directory / "model"

    @property
    def state(self) -> Path:
        """XDG_STATE_HOME of its user, under which its ledgers are found."""
        return self.root / "state"

    def config(self, *overrides: str) -> RunConfig:
        """The tiny settings with a run and silo states of one's own."""
        return load("tiny", overrides)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> TinyRun:
    """Made by whichever process of the session comes first, with what the wheel installs. Nothing is changed in it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny"
    shared.mkdir(exist_ok=True)
    root, programs, said = shared / "run", shared / "wheel" / "environment" / "bin", shared / "said.json"
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            assert install(shared / "wheel") == programs
            root.mkdir()
            command = [str(programs / "siloweave"), "demo", "-c", "tiny", "--json"]
            environment = {**outside_the_checkout(), "XDG_STATE_HOME": str(root / "state")}
            done = subprocess.run(
                command, cwd=root, env=environment, capture_output=True, text=True, timeout=800, check=False
            )
            assert done.returncode == 0, done.stderr
            said.write_text(json.dumps([done.stdout, done.stderr]))
    output, errors = json.loads(said.read_text())
    return TinyRun(root, root / "runs" / "tiny", json.loads(output), errors, programs)


@pytest.fixture(scope="session")
def tiny_model(tiny_run) -> Path:
    return tiny_run.model


@pytest.fixture(scope="session")
def shared_ray():
    """One embedded Ray for all in-process federations of the session."""
    from cluster.runtime.session import ray_session

    before = dict(os.environ)
    with ray_session(load("tiny").cluster, 2) as ray:
        # Commands find nothing of it, and may be forked; those that join it are given it.
        ray.environment = {name: os.environ.pop(name) for name in os.environ.keys() - before.keys()}
        yield ray


@pytest.fixture
def joined_ray(shared_ray, monkeypatch):
    """The test's commands join that Ray, where it isn't their own start of one that is looked at."""
    for name, value in shared_ray.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_ADDRESS", shared_ray.get_runtime_context().gcs_address)
    # By itself Ray takes another address of this machine for 127.0.0.1, where a Ray of our own does not listen.
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


@pytest.fixture(scope="session")
def warm_ray(shared_ray):
    """The same with processes that stay, for federations that are only looked at."""
    from warm_hosts import WarmRay

    return WarmRay(shared_ray)


@pytest.fixture
def sockets():
    """A folder for sockets: pytest's own paths may be too long for one."""
    with tempfile.TemporaryDirectory(prefix="sw-") as folder:
        yield Path(folder)


@pytest.fixture
def link(tmp_path, sockets):
    """Flower's SuperLink with nodes, for silos' services in ``sockets``."""
    from flower_link import FlowerLink

    (tmp_path / "link").mkdir()
    started = FlowerLink(tmp_path / "link", f"unix:{sockets}/none")
    yield started
    started.end()
