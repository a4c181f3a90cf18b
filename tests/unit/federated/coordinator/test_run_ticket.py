"""A run's time against real silos: whose clock says what, and what a renewal spends."""

import json
import time
from types import SimpleNamespace

import pytest
from signed_silos import InProcess, SignedSilo, adapter, coordinator
from silo_requests import signer_of

from configs.errors import InputError, PolicyRefusal
from configs.events import EventLog, read_events
from configs.locks import locked
from configs.schema.silo import SiloConfig
from configs.storage.files import digest_bytes
from federated.adapters.warm_model import initial_adapter
from federated.coordinator import round_commits as commits
from federated.coordinator import run_ticket
from federated.coordinator.outcome import LOCK
from federated.coordinator.parties import Parties
from federated.coordinator.rounds import Coordinator
from federated.protocol.clocks import shown
from federated.silo import requests
from federated.silo.silo import Silo

SIGNER = signer_of(bytes(range(32)))
DAY_S = 86400.0
NOW = time.time()
BUDGET = 20.0


class Clock:
    """One side's clock, ahead of the machine's by some seconds; it stands, so that no day ends while a test runs."""

    def __init__(self):
        self.ahead_s = 0.0

    def time(self):
        return NOW + self.ahead_s


class Federation:
    """Two real silos in this process, and a coordinator, each side with a clock of its own."""

    def __init__(self, folder, tiny_run, monkeypatch):
        self.folder, self.tiny_run, self.clock = folder, tiny_run, Clock()
        self.silos = [
            Silo(silo_config(folder, tiny_run.model, name), frozenset({SIGNER.public_key})) for name in ("east", "west")
        ]
        self.clocks, self.said = {silo: Clock() for silo in self.silos}, []
        monkeypatch.setattr(run_ticket, "time", SimpleNamespace(time=self.clock.time))
        self._answering = self.silos[0]
        monkeypatch.setattr(requests, "time", SimpleNamespace(time=self._silos_time))
        self.run_dir = folder / "federated"

    def config(self, *overrides):
        settings = ("federated.rounds=2", "federated.local_steps=1", "privacy.epsilon=2", "federated.run_lifetime_h=12")
        return self.tiny_run.config(*settings, "federated.round_timeout_s=30", *overrides)

    def run(self, *overrides, rounds=None):
        """All rounds; or some, as if the coordinator were killed after them."""
        grid = InProcess([SimpleNamespace(handle=self._at(silo)) for silo in self.silos])
        log = EventLog(self.run_dir / "events.jsonl")
        settings = self.config(*overrides)
        one = Coordinator(grid, settings, self.tiny_run.model, self.run_dir, Parties(SIGNER, 2), log)
        whole_round = one._round

        def dies(number, adapter):
            if rounds is not None and number > rounds:
                raise KeyboardInterrupt
            return whole_round(number, adapter)

        one._round = dies
        one.run(lambda: initial_adapter(settings, self.tiny_run.model))

    def _silos_time(self):
        return self.clocks[self._answering].time()

    def _at(self, silo):
        def handle(content):
            self._answering = silo
            return silo.handle(content)

        return handle

    def renew(self):
        self.said.clear()
        run_ticket.renew(self.run_dir, self.config(), self.said.append)

    def bodies(self, silo=0):
        return self.silos[silo].ledger.journal.bodies()

    def kinds(self):
        return [body["kind"] for body in self.bodies()]


def silo_config(folder, model, name):
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps({"text": f"note {i} of the {name} ward"}) + "\n" for i in range(60)))
    return SiloConfig(
        silo={
            "id": name,
            "dataset_id": f"ward-{name}",
            "state_dir": str(folder / "state" / name),
            "base_model": str(model),
            "public_record_count": 60,
        },
        data={"source": str(data)},
        policy={"budget_epsilon": BUDGET, "budget_delta": 1e-3, "max_epsilon_per_run": 10.0, "max_sampling_rate": 0.9},
    )


@pytest.fixture
def federation(tmp_path, tiny_run, monkeypatch):
    made = Federation(tmp_path, tiny_run, monkeypatch)
    yield made
    for silo in made.silos:
        silo.close()


def test_a_silo_whose_clock_is_a_day_ahead_is_told_by_both_times(federation):
    """Before: `1 of 1 silos answered; see the silos' own logs`, and there a number of seconds."""
    federation.clocks[federation.silos[1]].ahead_s = DAY_S
    with pytest.raises(PolicyRefusal, match=r"1 of 1 silos answered, federated\.min_silos is 2") as caught:
        federation.run("federated.min_silos=2")
    told = str(caught.value)
    today, tomorrow = (shown(NOW + ahead)[:10] for ahead in (0, DAY_S))
    assert caught.value.rule == "expires"
    assert f"this silo's clock says {tomorrow}" in told
    assert f"the coordinator's clock says {today}" in told
    assert f"valid until {shown(json.loads((federation.run_dir / 'run.json').read_text())['expires'])}" in told
    assert "have the clock that is wrong set" in told and "--renew" in told
    federation.run("federated.min_silos=1")
    events = list(read_events(federation.run_dir / "events.jsonl"))
    assert [event["answered"] for event in events if event["event"] == "round"] == [["east"], ["east"]]
    assert tomorrow in next(event["message"] for event in events if event["event"] == "rejected")
    assert [body["kind"] for body in federation.bodies(1)] == ["open"], "it was charged for nothing"


def test_clocks_that_are_behind_change_nothing(federation):
    for clock in (*federation.clocks.values(), federation.clock):
        clock.ahead_s = -DAY_S
    federation.run()
    assert federation.kinds().count("release") == 2


def test_a_run_beyond_its_time_is_renewed_at_its_price_and_nothing_is_uncharged(federation):
    with pytest.raises(KeyboardInterrupt):
        federation.run(rounds=1)
    before, run_id = federation.bodies(), federation.bodies()[1]["run"]
    federation.clock.ahead_s = DAY_S
    with pytest.raises(
        InputError, match=r"the coordinator's clock says .* is valid until .*--renew.* reserves epsilon"
    ) as caught:
        federation.run()
    epsilon = before[1]["epsilon"]
    price = f"reserves epsilon {epsilon:.4g} at delta 1e-05 again at each silo"
    left = f"east {BUDGET - epsilon:.4g}, west {BUDGET - epsilon:.4g}"
    assert price in str(caught.value) and left in str(caught.value)
    assert federation.bodies() == before, "a run that is over asks nobody for anything"

    with locked(federation.run_dir / LOCK, b"7"), pytest.raises(InputError, match="at work"):
        federation.renew()
    federation.renew()
    assert price in federation.said[0] and left in federation.said[0]
    assert not federation.run_dir.exists()
    (aside,) = federation.run_dir.parent.glob("federated-until-*")
    assert len(commits.all_rounds(aside)) == 2
    federation.renew()  # the command again, after a kill here
    assert not federation.said and len(list(federation.run_dir.parent.glob("federated-until-*"))) == 1

    federation.clocks.update(dict.fromkeys(federation.silos, federation.clock))
    with pytest.raises(KeyboardInterrupt):
        federation.run(rounds=0)  # after the reservation, before the first round
    federation.renew()
    assert "nothing is renewed" in federation.said[0]
    federation.run()
    bodies = federation.bodies()
    assert bodies[: len(before)] == before, "what was spent stays spent"
    reserved = [body for body in bodies if body["kind"] == "reserve"]
    assert len(reserved) == 2 and len({body["run"] for body in reserved}) == 2
    assert federation.silos[0].ledger.left().epsilon == pytest.approx(BUDGET - 2 * epsilon)
    assert [body["run"] for body in bodies if body["kind"] == "close"] == [reserved[1]["run"]] != [run_id]
    charged = [(body["run"], body["round"], body["digest"]) for body in bodies if body["kind"] == "charge"]
    assert [round_number for _, round_number, _ in charged] == [1, 1, 2]
    assert len({digest for _, _, digest in charged}) == 3, "no charge is found again, and so no noise"
    first, again = (commits.all_rounds(folder)[1].adapter for folder in (aside, federation.run_dir))
    assert digest_bytes(first) != digest_bytes(again)
    assert commits.all_rounds(aside)[0].adapter == commits.all_rounds(federation.run_dir)[0].adapter


def test_a_run_whose_rounds_are_done_is_certified_whatever_the_time_is(tmp_path, monkeypatch):
    """Its silos refuse to close it by then; nothing is renewed, and so nothing reserved again."""
    silos, clock = [SignedSilo("one"), SignedSilo("two")], Clock()
    coordinator(InProcess(silos), tmp_path).run(adapter)
    monkeypatch.setattr(run_ticket, "time", SimpleNamespace(time=clock.time))
    clock.ahead_s = 10_000 * DAY_S
    one, said = coordinator(InProcess(silos), tmp_path), []
    run_ticket.renew(tmp_path / "run", one.config, said.append)
    assert "nothing is renewed" in said[0]
    one.run(adapter)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"run_id": 3}', '{"expires": 3}', '{"run_id": "a", "expires": "b"}']
)
def test_a_damaged_ticket_is_no_new_run(tmp_path, content):
    """A new id would have the silos charged a second time."""
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"run\.json.*"):
        run_ticket.open_run(tmp_path, 1.0)
    assert path.read_text() == content
