"""A federation with clients as units over the local grid: its certificate, stops, who is missing, its budget."""

import json
import shutil
import time

import pytest

from configs.errors import InputError, PolicyRefusal, SiloweaveError
from configs.storage.files import write_atomic
from federated.adapters.arrays import from_bytes
from federated.coordinator import round_commits as commits
from federated.coordinator.exchange import SiloExchange
from federated.coordinator.rounds import Coordinator
from federated.simulation.simulated_places import simulated_ledger
from federated.simulation.simulation import simulate
from privacy.certificate.certificate import AGGREGATOR
from privacy.certificate.check import check_certificate, check_in_ledger
from privacy.ledger.chain import verify_entries
from privacy.ledger.file import read_only
from privacy.ledger.replay import replay

SEED = bytes(range(32))
CLIENT = (
    "privacy.unit=client",
    "privacy.num_clients=2",
    "privacy.max_grad_norm=0.2",
    "evaluate.without_dp=false",
    "federated.aggregation=fedavgm",
    "federated.workers=1",
    "federated.min_silos=2",
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


def check_ledgers(tmp_path, config, directory):
    """The aggregator's, with the certificate, and what the silos' tell of updates without noise."""
    ledger = simulated_ledger(config)
    assert kinds(ledger) == ["open", "reserve", "charge", "release", "charge", "release", "close"]
    entries = read_only(ledger / "ledger.sqlite")
    document, bodies = json.loads((directory / "certificate.json").read_text()), verify_entries(entries, "ledger")
    check_certificate(document, "certificate")
    assert check_in_ledger(document, bodies, [entry["hash"] for entry in entries], "certificate") == AGGREGATOR
    assert document["seeds"].startswith("INJECTED in aggregator")
    for silo in ("roman", "romances"):
        folder = tmp_path / "state" / "plays-tiny" / silo
        assert kinds(folder) == ["open", "entrust", "unnoised", "unnoised", "close"]
        entries = read_only(folder / "ledger.sqlite")
        bodies = verify_entries(entries, silo)
        replay(bodies, silo)
        with pytest.raises(InputError, match="none has the ledger's key"):
            check_in_ledger(document, bodies, [entry["hash"] for entry in entries], "certificate")


def stops(*_):
    raise KeyboardInterrupt


def start_anew(tmp_path):
    """The same keys, and nothing spent: for a second run of the same requests."""
    state, keep = tmp_path / "state", tmp_path / "keep"
    for key in [state / "coordinator.key", *state.rglob("split.key")]:
        kept = keep / key.relative_to(state)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(key, kept)
    shutil.rmtree(state)
    shutil.move(keep, state)


def test_a_federation_is_certified_and_one_that_is_stopped_twice_gives_the_same_bytes(
    federation, tmp_path, monkeypatch
):
    """Round two is abandoned since too few answer, and stays charged; then stopped with its mean stored and no commit.

    The second and third time no seed is injected: what is there has to come out of the ledger.
    """
    config = federation(name="whole", injected_seed=SEED)
    whole = adapters(tmp_path / "whole")
    before, after = from_bytes(whole[0][0]), from_bytes(whole[2][0])
    assert all((before[name] != after[name]).any() for name in before)
    check_ledgers(tmp_path, config, tmp_path / "whole")

    start_anew(tmp_path)
    whole_round, send = Coordinator._round, SiloExchange._send

    def roman_is_away_in_round_two(self, bodies, kind, group, *patience):
        sent = send(self, bodies, kind, group, *patience)
        return (found for found in sent if group != "2" or self.grid._silo_of[found[0]] != "roman")

    def stops_after_round_two(self, number, adapter):
        result = whole_round(self, number, adapter)
        return result if number == 1 else stops()

    with monkeypatch.context() as patch, pytest.raises(SiloweaveError, match=r"1 of 2 silos answered, federated.min"):
        patch.setattr(SiloExchange, "_send", roman_is_away_in_round_two)
        federation(name="stopped", injected_seed=SEED)
    assert kinds(simulated_ledger(config)) == ["open", "reserve", "charge", "release", "charge"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Coordinator, "_round", stops_after_round_two)
        federation(name="stopped")
    assert sorted(adapters(tmp_path / "stopped")) == [0, 1]
    federation(name="stopped")
    assert adapters(tmp_path / "stopped") == whole
    check_ledgers(tmp_path, config, tmp_path / "stopped")


def test_the_clients_budget_ends_a_federation_before_anybody_is_asked(federation, tmp_path):
    with pytest.raises(PolicyRefusal, match="budget_epsilon") as caught:
        federation("privacy.budget_epsilon=7")
    assert caught.value.exit_status == 3
    assert not (tmp_path / "state" / "plays-tiny").exists()
