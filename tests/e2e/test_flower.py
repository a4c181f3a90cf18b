"""One round through Flower's real processes, over TLS, gives the bytes that the local grid gives."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import pytest
import tomli_w
from flower_processes import (
    APP,
    BIN,
    END_S,
    NAME,
    RUN_S,
    SEED,
    SEEDED_SERVICE,
    START_S,
    Processes,
    adapter,
    federation,
    is_serving,
    listens,
    silo_toml,
)
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from ports import free_port
from repository import found_below
from silo_requests import body_of, opened

from configs.load import load
from configs.parse import to_toml
from configs.schema.schema import RunConfig
from configs.schema.silo import load_silo
from configs.storage.layout import AGGREGATOR_FOLDER
from configs.storage.manifests import require_manifest
from federated.adapters.arrays import to_bytes
from federated.adapters.warm_model import initial_adapter
from federated.coordinator import rounds
from federated.coordinator.parties import Parties
from federated.identity.keys import load_or_create_key
from federated.identity.trust import coordinator_signer, enrolled_silos
from federated.identity.x509 import CURVE, Authority
from federated.protocol import silo_pb2 as pb
from federated.protocol.envelope import seal_request
from federated.silo.silo import Silo
from federated.simulation.local_grid import LocalGrid
from federated.transport.client_app import make_app, reach_service
from federated.transport.flower_messages import pack, unpack
from federated.transport.service_client import ask_service
from privacy.certificate.check import check_certificate
from privacy.ledger.chain import verify_entries
from privacy.ledger.file import read_only
from privacy.plan import PlanTerms


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


@pytest.fixture(scope="module")
def flower(tmp_path_factory) -> Iterator[tuple[Processes, Path]]:
    """One SuperLink and SuperNode for all runs, and the socket at which the silo of each is reached."""
    with tempfile.TemporaryDirectory(prefix="sw-") as sockets:
        path = Path(sockets) / "silo.sock"
        started = Processes(tmp_path_factory.mktemp("flower"))
        started.environment["XDG_STATE_HOME"] = str(started.directory / "state")
        try:
            start_flower(started, f"unix:{path}")
            yield started, path
        finally:
            started.end()


def start_flower(processes: Processes, silo_address: str) -> None:
    """SuperLink and SuperNode on loopback, over TLS; `flwr run APP local` reaches them."""
    port, node_port = str(free_port()), str(free_port())
    home = Path(processes.environment["FLWR_HOME"])
    home.mkdir()
    files = {name: str(home / name) for name in ("ca.key", "ca.pem", "server.key", "server.pem")}
    key = load_or_create_key(home / "server.key", CURVE)
    authority = Authority(home / "ca.key", home / "ca.pem", "test")
    authority.issue(home / "server.pem", key.public_key(), "server", ["localhost", "127.0.0.1"], "server")
    link = {"superlink": {"local": {"address": f"127.0.0.1:{port}", "root-certificates": files["ca.pem"]}}}
    (home / "config.toml").write_text(tomli_w.dumps(link), encoding="utf-8")
    tls = ["--ssl-certfile", files["server.pem"], "--ssl-keyfile", files["server.key"]]
    options = ["--ssl-ca-certfile", files["ca.pem"], "--disable-runtime-dependency-installation"]
    where = ["--host", "127.0.0.1", "--port", port]
    processes.start("superlink", str(BIN / "flower-superlink"), *where, *tls, *options)
    processes.wait_until("SuperLink's port", lambda: listens(port))
    node = ["--superlink", f"127.0.0.1:{port}", "--port", node_port, "--node-config", f'silo-address="{silo_address}"']
    processes.start("supernode", str(BIN / "flower-supernode"), "--root-certificates", files["ca.pem"], *node)


def run_over_flower(flower: tuple[Processes, Path], silo: Path, config: RunConfig, directory: Path, home: Path) -> None:
    """Serves a silo, and hands a run of it to Flower, to its end."""
    processes, socket_path = flower
    service = processes.start("silo", sys.executable, "-c", SEEDED_SERVICE, str(silo), str(socket_path), SEED.hex())
    processes.wait_until("silo service", lambda: is_serving(socket_path))
    run = start_run(processes, config, Path(load_silo(silo).silo.base_model), directory, home)
    processes.wait_until("end of the run", lambda: run.poll() is not None, RUN_S)
    processes.stop(service)
    assert (directory / "certificate.json").exists(), processes.logs()


def start_run(processes: Processes, config: RunConfig, model: Path, directory: Path, home: Path) -> psutil.Popen:
    """Hands a run of one silo to Flower."""
    given = {
        "config": to_toml(config),
        "base-model": str(model),
        "directory": str(directory),
        "coordinator": str(home),
        "num-silos": 1,
    }
    settings = processes.directory / "run-config.toml"
    settings.write_text(tomli_w.dumps(given), encoding="utf-8")
    command = [str(BIN / "flwr"), "run", str(APP), "local", "--run-config", str(settings), "--stream"]
    return processes.start("run", *command)


def test_flower_gives_the_bytes_of_the_local_grid(tiny_run, warm_ray, flower, tmp_path):
    model = tiny_run.directory / "model"
    # A smaller epsilon means more noise, which is calibrated faster.
    config = load("tiny", ["federated.rounds=1", f"federated.round_timeout_s={RUN_S}", "privacy.epsilon=1"])

    over_flower, home = federation(tmp_path / "over-flower"), tmp_path / "coordinator"
    run_over_flower(flower, silo_toml(config, model, tmp_path / "silo-over-flower", home), config, over_flower, home)

    over_grid = federation(tmp_path / "over-grid")
    # One after the other: at the second one's start the roster names another key of the same silo.
    silo = silo_toml(config, model, tmp_path / "silo-over-grid", home)
    parties = Parties(coordinator_signer(home), 1, partial(enrolled_silos, home))

    def open_silo(_name):
        return Silo(load_silo(silo), injected_seed=SEED)

    with LocalGrid(warm_ray, open_silo, [NAME], workers=1, threads=1) as grid:
        rounds.run_federation(grid, config, model, over_grid, parties, lambda _: None)
    assert adapter(over_flower, 0) == adapter(over_grid, 0)
    assert adapter(over_flower, 1) != adapter(over_flower, 0)
    assert adapter(over_flower, 1) == adapter(over_grid, 1)
    for directory in (over_flower, over_grid):
        check_certificate(json.loads((directory / "certificate.json").read_text()), str(directory))


def test_flower_runs_a_federation_with_clients_as_units(tiny_run, flower, tmp_path):
    changes = ["privacy.unit=client", "privacy.num_clients=1", "evaluate.without_dp=false", "federated.rounds=1"]
    config = load("tiny", [*changes, f"federated.round_timeout_s={RUN_S}", "privacy.epsilon=1"])
    directory, home, model = federation(tmp_path / "federated"), tmp_path / "coordinator", tiny_run.directory / "model"
    run_over_flower(flower, silo_toml(config, model, tmp_path / "silo", home), config, directory, home)
    assert adapter(directory, 1) != adapter(directory, 0)
    document = json.loads((directory / "certificate.json").read_text())
    check_certificate(document, "certificate")
    assert document["seeds"].startswith("operating system")
    ledger = home / AGGREGATOR_FOLDER / "ledger.sqlite"
    kinds = [body["kind"] for body in verify_entries(read_only(ledger), "ledger", document["aggregator"]["public_key"])]
    assert kinds == ["open", "reserve", "charge", "release", "close"]


def test_the_command_serves_a_silo(tiny_run, processes, socket_path, tmp_path, caplog):
    """Also when it is killed while it trains: its relay asks the next process again, which answers for the charge."""
    home = tmp_path / "coordinator"
    silo = silo_toml(load("tiny"), tiny_run.directory / "model", tmp_path / "silo", home)
    serving = (str(BIN / "siloweave"), "silo", "serve", "-c", str(silo), "--socket", str(socket_path))
    command = processes.start("silo", *serving)
    processes.wait_until("silo service", lambda: is_serving(socket_path))
    assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600
    signer = coordinator_signer(home)

    def ask(receipt=b"", **kind):
        body = body_of("request", silo_id=NAME, coordinator=signer.public_key, **kind)
        return opened(ask_service(f"unix:{socket_path}", seal_request(signer, body, receipt), timeout_s=START_S))

    reply = ask(describe=pb.Describe())
    assert (reply.silo_id, reply.described.public_record_count) == (NAME, 6000)
    written = silo.read_text()
    silo.write_text(written.replace("[policy]", "[policy"))  # its policy is read for each request
    assert ask(describe=pb.Describe()).refusal.rule == "policy"
    silo.write_text(written)
    # The receipt has crossed the socket, beside the body, and the refusal has come back with the status code.
    assert ask(receipt=b"no receipt", close=pb.Close()).refusal.rule == "receipt"
    plan = PlanTerms(
        sampling_rate=0.05, max_grad_norm=1.0, noise_multiplier=1.0, rounds=1, steps_per_round=40, delta=1e-5
    )
    assert ask(reserve=pb.Reserve(plan=plan.model_dump_json())).WhichOneof("kind") == "reserved"
    train = training(tiny_run, plan)
    body = body_of("round-1", silo_id=NAME, coordinator=signer.public_key, train=train)
    envelope = seal_request(signer, body)
    with ThreadPoolExecutor(1) as relay:
        answering = relay.submit(through_the_relay, f"unix:{socket_path}", envelope)
        processes.wait_until("a charge", lambda: entries(tmp_path / "silo")[-1] == "charge")
        command.kill()
        assert command.wait(END_S) == -signal.SIGKILL
        command = processes.start("silo-again", *serving)
        reply = answering.result(RUN_S)
    assert unpack(reply.content) == ask_service(f"unix:{socket_path}", envelope)  # what was stored
    assert opened(unpack(reply.content)).WhichOneof("kind") == "trained"
    assert entries(tmp_path / "silo") == ["open", "reserve", "charge", "release"]
    told = [record.getMessage() for record in caplog.records if record.name == "siloweave.relay"]
    assert told and all("\n" not in line and "asked again" in line and str(socket_path) in line for line in told), told
    command.terminate()
    assert command.wait(END_S) == 0, processes.logs()
    gone = through_the_relay(f"unix:{socket_path}", envelope, ttl_s=3)
    assert gone.error.reason.startswith(f"its service at unix:{socket_path} gave no answer (")
    assert "\n" not in gone.error.reason


def training(tiny_run, plan: PlanTerms) -> pb.Train:
    config = tiny_run.config()
    return pb.Train(
        round=1,
        plan_digest=plan.digest,
        base_model_digest=require_manifest(tiny_run.model, "model", "export").content_digest,
        task="causal",
        adapter_spec=pb.AdapterSpec(rank=config.federated.lora_rank, alpha=config.federated.lora_alpha),
        adapter=to_bytes(initial_adapter(config, tiny_run.model)),
        learning_rate=0.01,
        optimizer="adam",
    )


def through_the_relay(address: str, envelope: bytes, ttl_s: float = RUN_S) -> Message:
    """The answer of the very app that a SuperNode starts."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    context = Context(1, 1, {"silo-address": address}, RecordDict(), {})
    return make_app(reach_service)(Message(pack(envelope), 1, "train", ttl=ttl_s), context)


def entries(state_dir: Path) -> list[str]:
    path = state_dir / "ledger.sqlite"
    return [body["kind"] for body in verify_entries(read_only(path), str(path))]


def test_the_bundle_holds_the_shim_alone(processes, tmp_path):
    build = processes.start("build", str(BIN / "flwr"), "build", "--app", str(APP))
    processes.wait_until("bundle", lambda: build.poll() is not None)
    (bundle,) = tmp_path.glob("*.fab")
    with zipfile.ZipFile(bundle) as files:
        assert set(files.namelist()) == {"pyproject.toml", "siloweave_app.py", "LICENSE", ".info/CONTENT"}


def test_the_relay_imports_neither_torch_nor_the_silo():
    heavy = ("torch", "transformers", "datasets", "privacy", "trainer", "federated.silo", "federated.coordinator")
    script = "import sys, siloweave_app; siloweave_app.client; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(APP)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=START_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not found_below(done.stdout.split(), heavy)
