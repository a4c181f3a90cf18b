"""Flower's own simulation engine runs the same app: its relays reach two silo services by their partition ids."""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import tomli_w
from flower_processes import (
    APP,
    BIN,
    RUN_S,
    SEED,
    SEEDED_SERVICE,
    Processes,
    adapter,
    federation,
    is_serving,
    listens,
    silo_toml,
)
from ports import free_port

from configs.load import load
from configs.parse import to_toml
from configs.schema.silo import load_silo
from federated.coordinator import rounds
from federated.coordinator.parties import Parties
from federated.identity.trust import coordinator_signer, enrolled_silos
from federated.silo.silo import Silo
from federated.simulation.local_grid import LocalGrid
from privacy.certificate.check import check_certificate

SILOS = ("comedies", "roman")


def serve_silos(processes: Processes, settings: dict[str, Path], sockets: Path) -> str:
    """Starts a service a silo, and returns their addresses."""
    paths = {name: sockets / f"{name}.sock" for name in settings}
    for name, path in paths.items():
        processes.start(name, sys.executable, "-c", SEEDED_SERVICE, str(settings[name]), str(path), SEED.hex())
    processes.wait_until("silo services", lambda: all(is_serving(path) for path in paths.values()))
    return " ".join(f"unix:{path}" for path in paths.values())


def run_flower(processes: Processes, given: dict[str, object]) -> None:
    """`flwr run` on a SuperLink that simulates two nodes."""
    port, home = str(free_port()), Path(processes.environment["FLWR_HOME"])
    home.mkdir()
    link = {"superlink": {"local": {"address": f"127.0.0.1:{port}", "insecure": True}}}
    (home / "config.toml").write_text(tomli_w.dumps(link), encoding="utf-8")
    isolated = "--disable-runtime-dependency-installation"
    options = ["--insecure", "--simulation", "--host", "127.0.0.1", "--port", port, isolated]
    processes.start("superlink", str(BIN / "flower-superlink"), *options)
    processes.wait_until("SuperLink's port", lambda: listens(port))
    settings = processes.directory / "run-config.toml"
    settings.write_text(tomli_w.dumps(given), encoding="utf-8")
    nodes = "num-supernodes=2 client-resources-num-cpus=1 init-args-num-cpus=2"
    command = [str(BIN / "flwr"), "run", str(APP), "local", "--run-config", str(settings), "--federation-config", nodes]
    run = processes.start("run", *command, "--stream")
    processes.wait_until("end of the run", lambda: run.poll() is not None, RUN_S)


def test_flowers_simulation_gives_the_bytes_of_the_local_grid(tiny_model, warm_ray, tmp_path):
    config = load("tiny", ["federated.rounds=1", f"federated.round_timeout_s={RUN_S}", "privacy.epsilon=1"])
    over_flower, over_grid = federation(tmp_path / "over-flower"), federation(tmp_path / "over-grid")
    home = tmp_path / "coordinator"

    def silos(states: Path) -> dict[str, Path]:
        states.mkdir()
        return {name: silo_toml(config, tiny_model, states / name, home, name) for name in SILOS}

    processes = Processes(tmp_path)
    with tempfile.TemporaryDirectory(prefix="sw-") as sockets:  # pytest's own paths may be too long for a socket
        try:
            services = silos(tmp_path / "silos-over-flower")
            processes.environment["SILOWEAVE_SILO_ADDRESSES"] = serve_silos(processes, services, Path(sockets))
            given = {"config": to_toml(config), "base-model": str(tiny_model), "directory": str(over_flower)}
            run_flower(processes, {**given, "coordinator": str(home), "num-silos": len(SILOS)})
        finally:
            processes.end()
    assert (over_flower / "certificate.json").exists(), processes.logs()

    hosted = silos(tmp_path / "silos-over-grid")  # the roster now names their keys
    parties = Parties(coordinator_signer(home), len(SILOS), partial(enrolled_silos, home))

    def open_silo(name):
        return Silo(load_silo(hosted[name]), injected_seed=SEED)

    with LocalGrid(warm_ray, open_silo, SILOS, workers=2, threads=1) as grid:
        rounds.run_federation(grid, config, tiny_model, over_grid, parties, lambda _: None)
    assert adapter(over_flower, 1) != adapter(over_flower, 0)
    assert adapter(over_flower, 1) == adapter(over_grid, 1)
    certificate = json.loads((over_flower / "certificate.json").read_text())
    assert set(certificate["silos"]) == set(SILOS)
    check_certificate(certificate, str(over_flower))
