"""`siloweave silo attack` on what a finished federation has published, with its certificate and a silo's real ledger."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from configs.errors import InputError
from configs.parse import to_toml
from configs.storage.layout import SiloFiles
from federated.audit.own_attack import attack
from federated.audit.own_records import Wanted
from federated.simulation.simulation import simulated_silos
from privacy.ledger.chain import History
from privacy.ledger.file import read_only
from siloweave import app


@pytest.fixture(scope="module")
def silos(tiny_run):
    return simulated_silos(tiny_run.config(f"federated.state_dir={tiny_run.state / 'siloweave' / 'ledgers'}"), tiny_run.model)


def test_it(silos, tiny_run):
    for name, silo in silos.items():
        from pathlib import Path
        bodies = History.of(read_only(SiloFiles(Path(silo.silo.state_dir)).ledger)).bodies
        print(name, silo.data.held_out_fraction)
        found = attack(silo, bodies, Wanted(model=tiny_run.directory / "federated" / "adapter"))
        print({k: v for k, v in found.items() if k != "attacks"}, {k: (v["auc"], v["auc_interval"]) for k, v in found["attacks"].items()})
    assert 0
