"""A run with clients as units through Flower's real processes: its ledger lies beside the coordinator's key."""

import json
import sys

import tomli_w
from flower_processes import APP, BIN, RUN_S, SEED, SEEDED_SERVICE, adapter, federation, is_serving, silo_toml
from test_flower import processes, socket_path, start_flower  # noqa: F401  # fixtures

from configs.load import load, to_toml
from federated.aggregator import FOLDER
from privacy.certificate_check import check_certificate
from privacy.chain import verify_entries
from privacy.ledger_file import read_only


def test_flower_runs_a_federation_with_clients_as_units(tiny_run, processes, socket_path, tmp_path):  # noqa: F811
    changes = ["privacy.unit=client", "privacy.num_clients=1", "evaluate.without_dp=false", "federated.rounds=1"]
    config = load("tiny", [*changes, f"federated.round_timeout_s={RUN_S}", "privacy.epsilon=1"])
    directory, home, model = federation(tmp_path / "federated"), tmp_path / "coordinator", tiny_run.directory / "model"
    silo = silo_toml(config, model, tmp_path / "silo", home)
    processes.start("silo", sys.executable, "-c", SEEDED_SERVICE, str(silo), str(socket_path), SEED.hex())
    processes.wait_until("silo service", lambda: is_serving(socket_path))
    start_flower(processes, f"unix:{socket_path}")
    given = {
        "config": to_toml(config),
        "base-model": str(model),
        "directory": str(directory),
        "coordinator": str(home),
        "num-silos": 1,
    }
    settings = tmp_path / "run-config.toml"
    settings.write_text(tomli_w.dumps(given), encoding="utf-8")
    run = processes.start("run", str(BIN / "flwr"), "run", str(APP), "local", "--run-config", str(settings), "--stream")
    processes.wait_until("end of the run", lambda: run.poll() is not None, RUN_S)
    assert (directory / "certificate.json").exists(), processes.logs()
    assert adapter(directory, 1) != adapter(directory, 0)
    document = json.loads((directory / "certificate.json").read_text())
    check_certificate(document, "certificate")
    assert document["seeds"].startswith("operating system")
    ledger = home / FOLDER / "ledger.sqlite"
    kinds = [body["kind"] for body in verify_entries(read_only(ledger), "ledger", document["aggregator"]["public_key"])]
    assert kinds == ["open", "reserve", "charge", "release", "close"]
