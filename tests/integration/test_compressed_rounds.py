"""Federations whose updates travel in few bytes: what they learn, what is charged, and what a restart sends."""

import json
from pathlib import Path

import pytest

from configs.events import read_events
from federated.adapters.arrays import from_bytes, to_bytes
from federated.coordinator import round_commits as commits
from federated.coordinator.rounds import Coordinator
from federated.simulation.in_the_clear import score_held_out
from federated.simulation.simulated_places import simulated_silo
from federated.simulation.simulation import simulate
from privacy.certificate.check import check_certificate
from privacy.ledger.chain import verify_entries
from privacy.ledger.file import read_only
from trainer.data.embedded import plays

SEED, NAMES = bytes(range(32)), ("roman", "romances")
FEW = ("federated.update_dtype=int4", "federated.update_block=64", "federated.update_share=0.25")


@pytest.fixture
def federation(tiny_run, warm_ray, tmp_path):
    """Runs one of the tiny settings on two genres, with keys, run and seeds that are the same in every session."""
    source = tmp_path / "plays.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in plays() if row["silo"] in NAMES))

    def run(name, *overrides):
        folder, state = tmp_path / name, tmp_path / f"{name}.state"
        keys = [state / "plays-tiny" / silo / "split.key" for silo in NAMES]
        for path in (state / "coordinator.key", *keys):
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch(mode=0o600)
                path.write_bytes(SEED)
        folder.mkdir(exist_ok=True)
        (folder / "run.json").write_text(json.dumps({"run_id": "certain", "expires": 2**32}))
        config = tiny_run.config(
            f'data.private.source="{source}"',
            "data.private.public_record_counts={roman=3300, romances=2600}",
            *(f"federated.state_dir={state}", "federated.workers=1", "federated.rounds=3", *overrides),
        )
        simulate(warm_ray, config, tiny_run.model, folder, on_event=lambda _: None, injected_seed=SEED)
        return config, folder

    return run


def adapters(folder):
    return [found.adapter for found in commits.all_rounds(folder)]


def bits(config, model, adapter):
    silos = [simulated_silo(config, name, model) for name in NAMES]
    first, second = (score_held_out(config, silo, adapter, 10_000) for silo in silos)
    return (first + second).main


def ledger(config, silo):
    path = Path(config.federated.state_dir) / "plays-tiny" / silo / "ledger.sqlite"
    return verify_entries(read_only(path), str(path))


def test_a_federation_learns_from_few_bytes_and_a_restart_sends_the_same_ones(
    federation, tiny_model, tmp_path, monkeypatch
):
    """Ended in round 2 after the silos have answered, and then again in round 3, as a coordinator is that is killed."""
    config, folder = federation("whole", *FEW)
    rounds = adapters(folder)
    before, after = bits(config, tiny_model, None), bits(config, tiny_model, rounds[-1])
    assert after < 0.99 * before
    certificate = json.loads((folder / "certificate.json").read_text())
    check_certificate(certificate, "test")
    assert certificate["plan"]["compression"] == {"dtype": "int4", "block": 64, "share": 0.25}
    said = "rounded as plan.compression says, of it and of what earlier ones left out the largest values"
    assert said in certificate["left_each_silo"]
    for silo in NAMES:
        entries = ledger(config, silo)
        assert [body["kind"] for body in entries] == ["open", "reserve", *["charge", "release"] * 3, "close"]
        size = len(to_bytes(from_bytes(rounds[0])))
        assert all(body["reply_bytes"] < size / 5 for body in entries if body["kind"] == "release")
        kept = Path(config.federated.state_dir) / "plays-tiny" / silo / "remainders"
        assert list(kept.iterdir()) == []  # the run is closed

    whole_round = Coordinator._round
    for last in (2, 3):

        def dies(self, number, adapter, last=last):
            result = whole_round(self, number, adapter)
            if number == last:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(Coordinator, "_round", dies)
        with pytest.raises(KeyboardInterrupt):
            federation("killed", *FEW)
        monkeypatch.undo()
    again, resumed = federation("killed", *FEW)
    assert adapters(resumed) == rounds
    for silo in NAMES:
        assert [body["kind"] for body in ledger(again, silo)].count("charge") == 3


def test_buffered_rounds_with_what_was_left_out(federation):
    """Each step is of one silo's update, whichever came first."""
    buffered = ("federated.schedule=buffered", "federated.buffer=1", "federated.rounds=2")
    _, folder = federation("buffered", *FEW, *buffered)
    rounds = [event for event in read_events(folder / "events.jsonl") if event["event"] == "round"]
    assert [sum(event["updates"].values()) for event in rounds] == [1, 1]
    found = adapters(folder)
    assert len(set(found)) == 3
    check_certificate(json.loads((folder / "certificate.json").read_text()), "test")
