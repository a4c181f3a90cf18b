"""Flower's real processes and seeded silo services, for tests that compare their bytes with the local grid's."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from repository import REPOSITORY

from configs.parse import to_toml
from configs.schema.schema import RunConfig
from federated.deployment.supervisor import end_tree
from federated.identity.cards import EnrolledSilo, TrustedCoordinator
from federated.identity.trust import coordinator_signer, trust
from federated.protocol.framing import SERVICE
from federated.simulation.simulated_places import simulated_silo
from federated.transport.health import is_serving as asks
from privacy.signing import Signer

NAME = "comedies"
SEED, SPLIT_KEY = bytes(range(32)), bytes(range(32, 64))
BIN = Path(sys.executable).parent
APP = REPOSITORY / "federated" / "app"
EXPIRES = int(time.time()) + 3600
START_S, RUN_S, END_S = 400, 400, 120
# A service never injects a seed, so the one whose bytes are compared is not the command's.
SEEDED_SERVICE = """
import sys
from pathlib import Path
import torch
from configs.schema.silo import load_silo
from federated.silo.silo import Silo
from federated.transport.service import serve
torch.set_num_threads(1)
silo = Silo(load_silo(Path(sys.argv[1])), injected_seed=bytes.fromhex(sys.argv[3]))
serve(silo.handle, silo.config.policy.max_request_bytes, f"unix:{sys.argv[2]}")[0].wait_for_termination()
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

    def stop(self, process: psutil.Popen) -> None:
        """Ends one process, with all that it started; that it ends is no failure."""
        self._started.remove(process)
        end_tree([process], END_S)

    def end(self) -> None:
        end_tree(self._started, END_S)


def listens(port: str) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(port)), timeout=1):
        return True
    return False


def is_serving(path: Path) -> bool:
    return asks(f"unix:{path}", SERVICE)


def silo_toml(config: RunConfig, model: Path, state_dir: Path, coordinator: Path, name: str = NAME) -> Path:
    """The settings of a silo, with the split key that all silos here share, enrolled and trusting."""
    silo = simulated_silo(config, name, model)
    settings = silo.silo.model_copy(update={"state_dir": str(state_dir)})
    state_dir.mkdir()
    (state_dir / "split.key").write_bytes(SPLIT_KEY)
    (state_dir / "split.key").chmod(0o600)
    public_key = coordinator_signer(coordinator).public_key
    trust(state_dir, TrustedCoordinator(name="test", public_key=public_key))
    enrolled = EnrolledSilo(silo=name, public_key=Signer(state_dir / "silo.key").public_key, node_key="")
    (coordinator / "silos").mkdir(exist_ok=True)
    (coordinator / "silos" / f"{name}.json").write_text(enrolled.model_dump_json(), encoding="utf-8")
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
