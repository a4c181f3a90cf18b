"""Silos that are served over gRPC on Unix sockets, real in all but the line, and a rehearsal over them."""

import contextlib
import shutil
import tempfile
import time
from pathlib import Path

from flwr.app import Message
from signed_silos import InProcess
from silo_requests import COORDINATOR, TRUSTED, ward

from configs.load import load
from configs.run_directory import run_directory
from configs.storage.layout import RunFiles
from configs.storage.manifests import require_manifest
from federated.coordinator.parties import Parties
from federated.coordinator.rehearsal.rehearsal import Rehearsal
from federated.coordinator.rehearsal.verdict import away, judged
from federated.silo.silo import Silo
from federated.transport.client_app import answered
from federated.transport.service import serve
from federated.transport.service_client import ask

SOON = ("federated.round_timeout_s=60", "federated.local_steps=2", "privacy.epsilon=2", "federated.rounds=3")


class Served:
    """A silo behind its service, which is asked for so many seconds."""

    patience_s = 100.0

    def __init__(self, config):
        self.name, self.silo = config.silo.id, Silo(config, TRUSTED)
        self._folder = tempfile.mkdtemp(prefix="rehearsed-")  # a socket's path has to be short
        self.address = f"unix:{self._folder}/silo.sock"
        self.server, _ = serve(self.silo.handle, config.policy.max_request_bytes, self.address)

    def handle(self, content):
        return ask(self.address, content, timeout_s=self.patience_s)

    def end(self):
        self.server.stop(0).wait()
        self.silo.close()
        shutil.rmtree(self._folder)


class Line(InProcess):
    """A grid whose messages travel at so many bytes a second each way, to the real service or to ``ask``."""

    def __init__(self, silos, down=float("inf"), up=float("inf")):
        super().__init__(silos)
        self._down, self._up, self.ask = down, up, lambda silo, content: silo.handle(content)

    def pull_messages(self, message_ids):
        asked = [self._asked.pop(one) for one in list(message_ids) if one in self._asked]
        return [answered(one, lambda content, one=one: self._carried(one, content)) for one in asked]

    def _carried(self, message: Message, content: bytes) -> bytes:
        time.sleep(len(content) / self._down)
        reply = self.ask(self.silos[message.metadata.dst_node_id], content)
        time.sleep(len(reply) / self._up)
        return reply


@contextlib.contextmanager
def served(folder: Path, model: Path, config=None, **policy):
    """One silo, ``north``, in a folder of its own."""
    one = Served(config or ward(folder, model, **policy))
    try:
        yield one
    finally:
        one.end()


def settings(folder: Path, model: Path, *overrides: str):
    """A run's settings whose base model is there."""
    config = load("tiny", ["run.name=tried", f"run.storage={folder / 'runs'}", *SOON, *overrides])
    place = RunFiles(run_directory(config)).model
    if not place.exists():
        shutil.copytree(model, place)
    return config


def rehearse(grid, folder: Path, config):
    """What is found of the silo ``north``, and the rehearsal."""
    model = RunFiles(run_directory(config)).model
    silos = {silo.name: silo.silo.ledger.public_key for silo in grid.silos.values()}
    rehearsal = Rehearsal(grid, config, model, folder / "rehearsal", Parties(COORDINATOR, 1, lambda: silos))
    rehearsal.run()
    if "north" not in rehearsal.heard:
        return away("north", required=True, reason=next(iter(rehearsal.nodes.values()), "")), rehearsal
    digest = require_manifest(model, "model", config.model.made_by).content_digest
    return judged("north", rehearsal.heard["north"], config, digest, required=True), rehearsal
