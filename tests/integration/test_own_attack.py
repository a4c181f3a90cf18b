"""A silo attacks the model of a finished federation, which is known by its certificate and the silo's own ledger."""

import json
import shutil
from pathlib import Path

import pytest

from configs.errors import InputError
from configs.storage.layout import SiloFiles
from federated.audit.own_attack import attack
from federated.audit.own_records import Wanted
from federated.simulation.simulation import simulated_silos
from privacy.ledger.chain import History
from privacy.ledger.file import read_only


@pytest.fixture(scope="module")
def silo(tiny_run):
    """One of the silos that the run had, and what its ledger says."""
    config = tiny_run.config(f"federated.state_dir={tiny_run.state / 'siloweave' / 'ledgers'}")
    silo = simulated_silos(config, tiny_run.model)["tragedies"]
    return silo, History.of(read_only(SiloFiles(Path(silo.silo.state_dir)).ledger)).bodies


def published(tiny_run):
    return tiny_run.directory / "federated" / "adapter"


def test_under_dp_members_of_the_silo_are_not_told_from_what_it_held_out(silo, tiny_run):
    found = attack(*silo, Wanted(model=published(tiny_run), records=200))
    assert list(found["attacks"]) == ["model_loss", "model_loss_against_base"]
    assert (found["members"], found["held_out"], found["rounds"]) == (200, 200, [])
    assert found["epsilon"] == pytest.approx(8, abs=0.1)
    for figures in found["attacks"].values():
        assert abs(figures["auc"] - 0.5) < 0.2  # seven deviations of guessing
        low, high = figures["auc_interval"]
        assert low < figures["auc"] < high < low + 0.15


def edited(folder):
    path = folder / "certificate.json"
    document = json.loads(path.read_text())
    document["model"]["rounds"][0]["releases"]["tragedies"] = "0" * 64
    path.write_text(json.dumps(document))


def retrained(folder):
    path = folder / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\x00\x01")


def only_the_base(folder):
    shutil.rmtree(folder / "adapter")
    (folder / "model").rename(folder / "adapter")


WRONG = {
    "the update of round 1 is none that this silo's ledger knows": edited,
    "this is another model": retrained,
    "is the base model, which no private record has touched": only_the_base,
}


@pytest.mark.parametrize("message", WRONG)
def test_a_model_that_this_silo_did_not_take_part_in_is_refused(silo, tiny_run, tmp_path, message):
    for place in (published(tiny_run), tiny_run.model):
        shutil.copytree(place, tmp_path / place.name)
    shutil.copy(published(tiny_run).parent / "certificate.json", tmp_path)
    WRONG[message](tmp_path)
    with pytest.raises(InputError, match=message) as refused:
        attack(*silo, Wanted(model=tmp_path / "adapter"))
    assert "\n" not in str(refused.value)
