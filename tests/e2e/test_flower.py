"""One round through Flower's real processes gives the bytes that the local grid gives."""

import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import grpc
import psutil
import pytest
import tomli_w
from grpc_health.v1 import health_pb2, health_pb2_grpc
from silo_requests import body_of, opened

from configs.load import load, to_toml
from configs.schema import RunConfig
from configs.silo import load_silo, simulated_silo
from federated import server_app
from federated import silo_pb2 as pb
from federated.envelope import seal_request
from federated.exchange import Parties
from federated.local_grid import LocalGrid
from federated.silo import Silo
from federated.silo_client import exchange
from federated.silo_service import SERVICE
from federated.trust import EnrolledSilo, TrustedCoordinator, coordinator_signer, enrolled_silos, trust
from privacy.certificate_check import check_certificate
from privacy.signing import Signer

NAME = "comedies"
SEED, SPLIT_KEY = bytes(range(32)), bytes(range(32, 64))
BIN = Path(sys.executable).parent
APP = Path(server_app.__file__).parent / "app"
EXPIRES = int(time.time()) + 3600
START_S, RUN_S, END_S = 60, 150, 10
# A service never injects a seed, so the one whose bytes are compared is not the command's.
SEEDED_SERVICE = """
import sys
from pathlib import Path
import torch
from configs.silo import load_silo
from federated.silo import Silo
from federated.silo_service import serve
torch.set_num_threads(1)
silo = Silo(load_silo(Path(sys.argv[1])), injected_seed=bytes.fromhex(sys.argv[3]))
serve(silo, f"unix:{sys.argv[2]}")[0].wait_for_termination()
"""


class Processes:
    """Processes of one test. Each writes a log; leaving ends them and all that they started."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # Flower starts its helpers by name
            "FLWR_HOME": str(directory / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
        }
        self._started: list[psutil.Popen] = []

    def start(self, name: str, *command: str) -> psutil.Popen:
        with (self.directory / f"{name}.log").open("wb") as log:
            process = psutil.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment, cwd=self.directory
            )
        self._started.append(process)
        return process

    def wait_until(self, what: str, holds: Callable[[], bool], timeout_s: float = START_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            failed = [process.args for process in self._started if process.poll()]
            assert not failed, f"{failed} failed before {what}\n{self.logs()}"
            assert time.monotonic() < deadline, f"no {what} after {timeout_s} s\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        tails = [(path.name, path.read_text(errors="replace")[-3000:]) for path in sorted(self.directory.glob("*.log"))]
        return "\n".join(f"--- {name}\n{tail}" for name, tail in tails)

    def end(self) -> None:
        # The tree is read before anything ends: SuperLink puts its helpers into sessions of their own.
        tree = list(self._started)
        for process in self._started:
            with contextlib.suppress(psutil.NoSuchProcess):
                tree.extend(process.children(recursive=True))
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(tree, timeout=END_S)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(tree, timeout=END_S)


@pytest.fixture
def processes(tmp_path) -> Iterator[Processes]:
    started = Processes(tmp_path)
    try:
        yield started
    finally:
        started.end()


@pytest.fixture
def socket_path() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="sw-"))  # pytest's own paths may be too long for a socket
    try:
        yield directory / "silo.sock"
    finally:
        shutil.rmtree(directory)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def listens(port: str) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(port)), timeout=1):
        return True
    return False


def is_serving(path: Path) -> bool:
    with grpc.insecure_channel(f"unix:{path}") as channel:
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
        except grpc.RpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def silo_toml(config: RunConfig, model: Path, state_dir: Path, coordinator: Path) -> Path:
    """The settings of the one silo, with the split key that all silos of this file share, enrolled and trusting."""
    silo = simulated_silo(config, NAME, model)
    settings = silo.silo.model_copy(update={"state_dir": str(state_dir)})
    state_dir.mkdir()
    (state_dir / "split.key").write_bytes(SPLIT_KEY)
    (state_dir / "split.key").chmod(0o600)
    public_key = coordinator_signer(coordinator).public_key
    trust(state_dir, TrustedCoordinator(name="test", public_key=public_key))
    enrolled = EnrolledSilo(silo=NAME, public_key=Signer(state_dir / "silo.key").public_key, node_key="")
    (coordinator / "silos").mkdir(exist_ok=True)
    (coordinator / "silos" / f"{NAME}.json").write_text(enrolled.model_dump_json(), encoding="utf-8")
    path = state_dir / "silo.toml"
    path.write_text(to_toml(silo.model_copy(update={"silo": settings})), encoding="utf-8")
    return path


def federation(directory: Path) -> Path:
    """A federation's directory with a run id that is already chosen: the id is part of every request."""
    directory.mkdir()
    (directory / "run.json").write_text(json.dumps({"run_id": "e2e", "expires": EXPIRES}), encoding="utf-8")
    return directory


def adapter(directory: Path, round_number: int) -> bytes:
    return (directory / f"round-{round_number:05d}" / "adapter.safetensors").read_bytes()


def start_flower(processes: Processes, silo_address: str) -> None:
    """SuperLink and SuperNode on loopback; `flwr run APP local` reaches them."""
    port, node_port = free_port(), free_port()
    home = Path(processes.environment["FLWR_HOME"])
    home.mkdir()
    link = {"superlink": {"local": {"address": f"127.0.0.1:{port}", "insecure": True}}}
    (home / "config.toml").write_text(tomli_w.dumps(link), encoding="utf-8")
    isolated = "--disable-runtime-dependency-installation"
    processes.start("superlink", str(BIN / "flower-superlink"), "--insecure", "--port", port, isolated)
    processes.wait_until("SuperLink's port", lambda: listens(port))
    node = ["--superlink", f"127.0.0.1:{port}", "--port", node_port, "--node-config", f'silo-address="{silo_address}"']
    processes.start("supernode", str(BIN / "flower-supernode"), "--insecure", *node)


def test_flower_gives_the_bytes_of_the_local_grid(tiny_run, shared_ray, processes, socket_path, tmp_path):
    model = tiny_run.directory / "model"
    # A smaller epsilon means more noise, which is calibrated faster.
    config = load("tiny", ["federated.rounds=1", f"federated.round_timeout_s={RUN_S}", "privacy.epsilon=1"])

    over_flower, home = federation(tmp_path / "over-flower"), tmp_path / "coordinator"
    silo = silo_toml(config, model, tmp_path / "silo-over-flower", home)
    processes.start("silo", sys.executable, "-c", SEEDED_SERVICE, str(silo), str(socket_path), SEED.hex())
    processes.wait_until("silo service", lambda: is_serving(socket_path))
    start_flower(processes, f"unix:{socket_path}")
    given = {
        "config": to_toml(config),
        "base-model": str(model),
        "directory": str(over_flower),
        "coordinator": str(home),
        "num-silos": 1,
    }
    settings = tmp_path / "run-config.toml"
    settings.write_text(tomli_w.dumps(given), encoding="utf-8")
    run = processes.start("run", str(BIN / "flwr"), "run", str(APP), "local", "--run-config", str(settings), "--stream")

    over_grid = federation(tmp_path / "over-grid")
    # One after the other: at the second one's start the roster names another key of the same silo.
    processes.wait_until("end of the run", lambda: run.poll() is not None, RUN_S)
    assert (over_flower / "certificate.json").exists(), processes.logs()
    silo = silo_toml(config, model, tmp_path / "silo-over-grid", home)
    parties = Parties(coordinator_signer(home), 1, partial(enrolled_silos, home))

    def open_silo(_name):
        return Silo(load_silo(silo), injected_seed=SEED).handle

    with LocalGrid(shared_ray, open_silo, [NAME], workers=1, threads=1) as grid:
        server_app.run_federation(grid, config, model, over_grid, parties, lambda _: None)
    assert adapter(over_flower, 0) == adapter(over_grid, 0)
    assert adapter(over_flower, 1) != adapter(over_flower, 0)
    assert adapter(over_flower, 1) == adapter(over_grid, 1)
    for directory in (over_flower, over_grid):
        check_certificate(json.loads((directory / "certificate.json").read_text()), str(directory))


def test_the_command_serves_a_silo(tiny_run, processes, socket_path, tmp_path):
    home = tmp_path / "coordinator"
    silo = silo_toml(load("tiny"), tiny_run.directory / "model", tmp_path / "silo", home)
    command = processes.start(
        "silo", str(BIN / "siloweave"), "silo", "serve", "-c", str(silo), "--socket", str(socket_path)
    )
    processes.wait_until("silo service", lambda: is_serving(socket_path))
    assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600
    signer = coordinator_signer(home)

    def ask(receipt=b"", **kind):
        body = body_of("request", silo_id=NAME, coordinator=signer.public_key, **kind)
        return opened(exchange(f"unix:{socket_path}", seal_request(signer, body, receipt), timeout_s=30))

    reply = ask(describe=pb.Describe())
    assert (reply.silo_id, reply.described.public_record_count) == (NAME, 6000)
    # The receipt has crossed the socket, beside the body, and the refusal has come back with the status code.
    assert ask(receipt=b"no receipt", close=pb.Close()).refusal.rule == "receipt"
    command.terminate()
    assert command.wait(END_S) == 0, processes.logs()


def test_the_bundle_holds_the_shim_alone(processes, tmp_path):
    build = processes.start("build", str(BIN / "flwr"), "build", "--app", str(APP))
    processes.wait_until("bundle", lambda: build.poll() is not None)
    (bundle,) = tmp_path.glob("*.fab")
    with zipfile.ZipFile(bundle) as files:
        assert set(files.namelist()) == {"pyproject.toml", "siloweave_app.py", "LICENSE", ".info/CONTENT"}


def test_the_relay_imports_neither_torch_nor_the_silo():
    heavy = {"torch", "transformers", "datasets", "privacy", "trainer", "federated.silo", "federated.server_app"}
    script = "import sys, siloweave_app; siloweave_app.client; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(APP)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=START_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not heavy & set(done.stdout.split())
