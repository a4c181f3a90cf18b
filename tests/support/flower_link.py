"""Flower's own SuperLink in a thread of this process, a run on it, and the relay's node in a process."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.superlink.main import create_app
from ports import free_port

from federated.deployment.supervisor import end_tree
from federated.identity.keys import load_or_create_key
from federated.identity.x509 import CURVE, Authority


class FlowerLink:
    """A SuperLink over TLS with a database, one node that may connect, and one running run.

    Args:
        folder: holds keys, database, and what the node keeps.
        silo_address: of the silo's service.
    """

    def __init__(self, folder: Path, silo_address: str) -> None:
        self.folder, self.silo_address, self.port = folder, silo_address, free_port()
        self.state_dir = folder / "relay"
        self.state_dir.mkdir()
        authority = Authority(folder / "ca.key", folder / "ca.pem", "test")
        key = load_or_create_key(folder / "server.key", CURVE).public_key()
        authority.issue(folder / "server.pem", key, "server", ["localhost", "127.0.0.1"], "server")
        self.node_key = load_or_create_key(folder / "node.ssh", ec.SECP384R1())
        self.node: psutil.Popen | None = None
        self.others: list[psutil.Popen] = []
        self.heartbeats: HeartbeatSender | None = None
        self._start()
        state: Any = self.app.state.linkstate_factory.state()
        self.node_id = state.create_node("<id:none>", "none", public_key_to_bytes(self.node_key.public_key()), 0)
        self.new_run()

    def new_run(self) -> HttpGrid:
        """Ends the run, begins another one, and gives the coordinator's end of it."""
        state: Any = self.app.state.linkstate_factory.state()
        if self.heartbeats:
            self.heartbeats.stop()
            assert state.stop_run(self.run_id)
        whose = (NOOP_FEDERATION_ID, None, "<id:none>", TaskType.SERVER_APP)
        self.run_id = state.create_run("a/b", "1", "0" * 64, {}, *whose)
        (task,) = state.get_tasks(run_ids=[self.run_id])
        token, self.task_id = state.claim_task(task.task_id), task.task_id
        assert state.activate_task(task.task_id)
        self.token = token
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = self.run_id, 1, task.task_id
        certificate = (self.folder / "ca.pem").read_bytes()
        self.grid = HttpGrid(f"127.0.0.1:{self.port}", root_certificates=certificate, token=token)
        self.grid.set_run(Run.create_empty(self.run_id))
        self.heartbeats = HeartbeatSender(make_task_heartbeat_fn_http(self.grid._runtime_client))
        self.heartbeats.start()
        return self.grid

    def _start(self) -> None:
        with patch.dict(os.environ, FLWR_DATABASE=f"sqlite:///{self.folder}/superlink.sqlite"):
            self.app = create_app()
        files = {"ssl_keyfile": str(self.folder / "server.key"), "ssl_certfile": str(self.folder / "server.pem")}
        config = uvicorn.Config(self.app, host="127.0.0.1", port=self.port, log_level="warning", **files)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)

    def start_node(self, port: int, **environment: str) -> None:
        """Starts the relay's node, which reaches the SuperLink at this port."""
        self.node = self._started("node", port, self.state_dir, self.silo_address, environment)

    def start_another(self, name: str, silo_address: str) -> None:
        """Registers one more node and starts it, straight to the SuperLink."""
        key = load_or_create_key(self.folder / f"{name}.ssh", ec.SECP384R1())
        state: Any = self.app.state.linkstate_factory.state()
        state.create_node("<id:none>", "none", public_key_to_bytes(key.public_key()), 0)
        (self.folder / name).mkdir()
        straight = {"NO_PROXY": "localhost", "no_proxy": "localhost"}
        self.others.append(self._started(name, self.port, self.folder / name, silo_address, straight))

    def _started(
        self, name: str, port: int, state_dir: Path, silo_address: str, environment: dict[str, str]
    ) -> psutil.Popen:
        health, folder = f"127.0.0.1:{free_port()}", self.folder
        command = [sys.executable, "-m", "federated.transport.node", "--superlink", f"localhost:{port}"]
        command += ["--root-certificates", str(folder / "ca.pem"), "--key", str(folder / f"{name}.ssh")]
        command += ["--health", health, "--state", str(state_dir), "--silo-address", silo_address]
        with (folder / f"{name}.log").open("ab") as log:
            given = {**os.environ, **environment}
            return psutil.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=given)

    def kill_node(self) -> None:
        """Ends it without a word."""
        assert self.node is not None
        self.node.kill()
        self.node.wait()

    def end(self) -> None:
        """Ends everything."""
        end_tree([*self.others, *([self.node] if self.node else [])], 10)
        self.heartbeats.stop()
        self.server.should_exit = self.server.force_exit = True
        self.thread.join()
