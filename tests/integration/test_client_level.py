"""A federation with clients as units over the local grid: its certificate, stops, who is missing, its budget."""

import json
import shutil
import time

import pytest

from configs.artifacts import write_atomic
from configs.errors import PolicyRefusal, SiloweaveError
from configs.events import read_events
from federated import commits
from federated.adapters import from_bytes
from federated.aggregator import Aggregator, simulated_ledger
from federated.exchange import Exchange
from federated.rounds import Coordinator
from federated.simulation import simulate
from privacy.chain import verify_entries
from privacy.ledger import Ledger
from privacy.ledger_file import read_only

SEED = bytes(range(32))
CLIENT = (
    "privacy.unit=client",
    "privacy.num_clients=2",
    "privacy.max_grad_norm=0.2",
    "evaluate.without_dp=false",
    "federated.aggregation=fedavgm",
)


@pytest.fixture
def federation(tiny_run, shared_ray, tmp_path):
    """Runs one with two silos, in a folder of its own, under a run id that is always the same."""
    from trainer.data.embedded import plays

    source = tmp_path / "plays.jsonl"
    rows = [row for row in plays() if row["silo"] in ("roman", "romances")]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = json.dumps({"run_id": "same", "expires": int(time.time()) + 3600}).encode()

    def start(*overrides, name="federated", **options):
        config = tiny_run.config(
            f'data.private.source="{source}"',
            "data.private.public_record_counts={roman=3300, romances=2600}",
            f"federated.state_dir={tmp_path / 'state'}",
            *CLIENT,
            *overrides,
        )
        (tmp_path / name).mkdir(exist_ok=True)
        write_atomic(tmp_path / name / "run.json", run)
        simulate(shared_ray, config, tiny_run.model, tmp_path / name, on_event=lambda _: None, **options)
        return config

    return start


def adapters(folder):
    return {found.round_number: (found.adapter, found.server_state) for found in commits.all_rounds(folder)}


def kinds(folder):
    return [body["kind"] for body in verify_entries(read_only(folder / "ledger.sqlite"), str(folder))]


def start_anew(tmp_path):
    """The same keys, and nothing spent: for a second run of the same requests."""
    state, keep = tmp_path / "state", tmp_path / "keep"
    for key in [state / "coordinator.key", *state.rglob("split.key")]:
        kept = keep / key.relative_to(state)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(key, kept)
    shutil.rmtree(state)
    shutil.move(keep, state)


def test_a_federation_is_certified_by_the_aggregators_ledger(federation, tmp_path, siloweave):
    config = federation()
    before, after = (from_bytes(adapters(tmp_path / "federated")[number][0]) for number in (0, 2))
    assert all((before[name] != after[name]).any() for name in before)
    ledger = simulated_ledger(config)
    assert kinds(ledger) == ["open", "reserve", "charge", "release", "charge", "release", "close"]
    for silo in ("roman", "romances"):
        assert kinds(tmp_path / "state" / "plays-tiny" / silo) == ["open", "entrust", "unnoised", "unnoised", "close"]
    path = tmp_path / "federated" / "certificate.json"
    verified = siloweave("ledger", "verify", str(ledger), "--certificate", str(path), "--json", cwd=tmp_path)
    assert verified.returncode == 0, verified.stderr
    found = json.loads(verified.stdout)
    assert (found["unit"], found["silo"], found["anchor"]) == ("client", "aggregator", "agrees")
    assert found["epsilon_left"] == pytest.approx(32 - found["headline"]["epsilon"])
    silo = siloweave("ledger", "verify", str(tmp_path / "state" / "plays-tiny" / "roman"), cwd=tmp_path)
    assert silo.returncode == 0, silo.stderr
    shown = siloweave(
        "ledger", "verify", str(tmp_path / "state" / "plays-tiny" / "roman"), "--certificate", str(path), cwd=tmp_path
    )
    assert shown.returncode == 2
    assert "none has the ledger's key" in shown.stderr


@pytest.mark.parametrize("at", ["charge", "release", "commit"])
def test_a_run_that_is_stopped_between_charge_and_commit_gives_the_same_bytes(federation, tmp_path, monkeypatch, at):
    """Stopped in round two; the second time no seed is injected: what is there has to come out of the ledger."""
    federation(name="whole", injected_seed=SEED)
    start_anew(tmp_path)
    owner, name = {"charge": (Coordinator, "_ask"), "release": (Ledger, "release"), "commit": (Aggregator, "round")}[at]
    method, calls = getattr(owner, name), []

    def stops(*arguments, **options):
        calls.append(name)
        if len(calls) == 2 and at != "commit":
            raise KeyboardInterrupt
        result = method(*arguments, **options)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, stops)
    with pytest.raises(KeyboardInterrupt):
        federation(name="stopped", injected_seed=SEED)
    monkeypatch.undo()
    assert sorted(adapters(tmp_path / "stopped")) == [0, 1]
    config = federation(name="stopped")
    assert adapters(tmp_path / "stopped") == adapters(tmp_path / "whole")
    assert kinds(simulated_ledger(config)).count("charge") == 2
    assert json.loads((tmp_path / "stopped" / "certificate.json").read_text())["seeds"].startswith(
        "INJECTED in aggregator"
    )


def test_a_missing_client_is_zero_and_too_few_end_the_round_charged(federation, tmp_path, monkeypatch):
    send, away = Exchange._send, {"roman"}

    def deaf(self, bodies, kind, group):
        return (found for found in send(self, bodies, kind, group) if kind != "train" or found[2].silo_id not in away)

    monkeypatch.setattr(Exchange, "_send", deaf)
    config = federation("federated.rounds=1", name="one-away")
    (event,) = [event for event in read_events(tmp_path / "one-away" / "events.jsonl") if event["event"] == "round"]
    assert event["answered"] == ["romances"]
    start_anew(tmp_path)
    with pytest.raises(SiloweaveError, match=r"1 of 2 silos answered, federated.min_silos is 2"):
        federation("federated.rounds=1", "federated.min_silos=2", name="too-few")
    assert kinds(simulated_ledger(config)) == ["open", "reserve", "charge"]
    assert sorted(adapters(tmp_path / "too-few")) == [0]


def test_the_clients_budget_ends_a_federation_before_anybody_is_asked(federation, tmp_path):
    with pytest.raises(PolicyRefusal, match="budget_epsilon") as caught:
        federation("privacy.budget_epsilon=7")
    assert caught.value.exit_status == 3
    assert not (tmp_path / "state" / "plays-tiny").exists()
