"""The steward's view of a ledger's runs, whatever they are called, and how one is ended."""

import json

import pytest
from silo_requests import COORDINATOR, body_of, silo_toml
from typer.testing import CliRunner

from configs.errors import InputError, PolicyRefusal
from federated.commands.silo import silo_app
from federated.protocol import silo_pb2 as pb
from federated.silo.requests import decode
from privacy.ledger.chain import Budget
from privacy.ledger.ledger import Ledger
from privacy.plan import PlanTerms, PrivacyPlan

PLAN = PlanTerms(sampling_rate=0.05, max_grad_norm=1.0, noise_multiplier=2.0, rounds=1, steps_per_round=2, delta=1e-5)


@pytest.fixture
def toml(tmp_path):
    return silo_toml(tmp_path, max_epsilon_per_run=10.0)


def silo(toml, *arguments):
    return CliRunner().invoke(silo_app, ["runs", *arguments, "-c", str(toml)])


def test_a_run_whose_name_cannot_be_typed_is_ended_by_its_entry(toml, tmp_path):
    """Before: nothing that a terminal takes was the name of a run that began with a NUL."""
    ledger = Ledger.open(tmp_path / "state", "north", "ward", Budget(20.0, 1e-4))
    plan = PrivacyPlan(terms=PLAN, public_record_count=100)
    for name in ("\x00x", "x"):
        ledger.reserve(name, plan, coordinator=COORDINATOR.public_key)
    found = json.loads(silo(toml, "--json").stdout)
    assert [(run["entry"], run["run"]) for run in found] == [(2, "\x00x"), (3, "x")]
    assert "entry 2  '\\x00x'  open" in silo(toml).stdout
    assert "stopped by the steward" in silo(toml, "stop", "--entry", "2").stdout
    assert [run["state"] for run in json.loads(silo(toml, "--json").stdout)] == ["stopped by the steward", "open"]
    for arguments in ((), ("x", "--entry", "3")):
        assert "give the run's name, or --entry" in str(silo(toml, "stop", *arguments).exception)
    for entry in ("1", "2", "9"):
        assert f"0 open runs are called {entry} " in str(silo(toml, "stop", "--entry", entry).exception)


@pytest.mark.parametrize("field", ["run_id", "request_id"])
@pytest.mark.parametrize("name", ["\x00x", "a\u202eb", "a\nb", "\u200b"])
def test_a_name_that_is_not_shown_as_it_is_is_refused(field, name):
    for kind in ({"describe": pb.Describe()}, {"reserve": pb.Reserve()}):
        with pytest.raises(PolicyRefusal) as refusal:
            decode(body_of(**{"request_id": "one", field: name, **kind}), "north")
        assert refusal.value.rule == field
    assert decode(body_of("Größe 1/ä", run_id="rün 1", close=pb.Close()), "north").run_id == "rün 1"


def test_looking_at_the_runs_of_a_silo_that_has_not_started_makes_nothing(toml, tmp_path):
    """Before: key and ledger were made, as whoever looked."""
    for arguments in ((), ("stop", "run-1")):
        failed = silo(toml, *arguments).exception
        assert isinstance(failed, InputError)
        assert f"{tmp_path / 'state' / 'ledger.sqlite'}: no ledger yet" in str(failed)
    assert [path.name for path in tmp_path.iterdir()] == ["silo.toml"]
