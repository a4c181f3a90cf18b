"""Secure aggregation with real silos: over the local grid, and over Flower's SuperLink where a service is killed."""

import json
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from flower_processes import federation as federation_folder
from flower_processes import silo_toml

from configs.errors import SiloweaveError
from configs.events import read_events
from configs.load import load
from configs.schema.silo import load_silo
from federated.adapters.arrays import from_bytes, to_bytes
from federated.aggregation.secure_sum import arrays_of
from federated.coordinator import round_commits as commits
from federated.coordinator.flower_grid import OneByOne
from federated.coordinator.parties import Parties
from federated.coordinator.rounds import run_federation
from federated.coordinator.trusted_aggregator import open_ledger
from federated.deployment.silo_site import confirm_silo
from federated.deployment.supervisor import end_tree
from federated.identity.cards import EnrolledSilo, read_document
from federated.identity.trust import coordinator_signer, enrolled_silos
from federated.silo.silo import Silo
from federated.simulation.local_grid import LocalGrid
from federated.simulation.public_silo import own_signer
from federated.simulation.simulated_places import simulated_silo
from federated.simulation.simulation import simulate
from federated.transport.service import serve
from privacy.certificate.check import check_certificate
from privacy.ledger.chain import verify_entries
from privacy.ledger.file import read_only
from privacy.mechanism.masked_clients import client_encoding, noised_client_mean
from privacy.mechanism.streams import Streams, injected_seeds
from privacy.plan_from_settings import plan_terms

NAMES = ("east", "north", "south")
SEED = bytes(range(32))
WHOLE_RUN = ["open", "reserve", "charge", "release", "close"]
# It ends itself, as a kill -9 would, when the request for its masked update has come and before it answers.
DYING_SERVICE = """
import os, signal, sys
from pathlib import Path
import torch
from configs.schema.silo import load_silo
from federated.silo.silo import Silo
from federated.transport.service import serve
torch.set_num_threads(1)
silo, killed = Silo(load_silo(Path(sys.argv[1]))), Path(sys.argv[3])
def handle(content):
    if b"round-1-masked" in content and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return silo.handle(content)
serve(handle, silo.config.policy.max_request_bytes, f"unix:{sys.argv[2]}")[0].wait_for_termination()
"""


class WatchedSilo(Silo):
    """A real silo that keeps what it has trained, for the test; it is silent when masked updates are due, if told."""

    silent = False

    def keeping(self):
        begun, folder = self._masking.begun, Path(self.config.silo.state_dir)

        def watched(agreement, update, plan_digest, release):
            content = to_bytes(update) if isinstance(update, dict) else update.tobytes()
            (folder / f"update-{release[3]}").write_bytes(content)
            return begun(agreement, update, plan_digest, release)

        self._masking.begun = watched
        return self

    def handle(self, content):
        reply = super().handle(content)
        if self.silent and b"-masked" in content:
            raise RuntimeError("no answer")
        return reply


def open_silo(silos, trusted, roster, silent, name):
    silo = WatchedSilo(silos[name], trusted, roster=roster).keeping()
    silo.silent = name in silent
    return silo


@pytest.fixture
def settings(tmp_path):
    """Settings of a federation of three silos with a few notes each."""
    rows = [{"text": f"note {row} of ward {name}", "silo": name} for name in NAMES for row in range(60)]
    source = tmp_path / "notes.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def made(*overrides):
        fixed = (
            f'data.private.source="{source}"',
            "data.private.public_record_counts={}",
            "data.private.public_record_count=100",
            f"federated.state_dir={tmp_path / 'state'}",
            "federated.local_steps=1",
            "federated.workers=1",
            "federated.secure_aggregation=true",
            "privacy.epsilon=4",
        )
        return load("tiny", [*fixed, *overrides])

    return made


def bodies(state_dir):
    path = state_dir / "ledger.sqlite"
    return verify_entries(read_only(path), str(path))


def kinds(state_dir):
    return [body["kind"] for body in bodies(state_dir)]


def events(folder, kind):
    return [event for event in read_events(folder / "events.jsonl") if event["event"] == kind]


def check_mean(run, number, states, error_bound):
    """A round has moved the model by the mean of what these silos have trained, up to the stated error."""
    rounds = {found.round_number: from_bytes(found.adapter) for found in commits.all_rounds(run)}
    updates = [from_bytes((state / f"update-{number}").read_bytes()) for state in states]
    for name, after in rounds[number].items():
        mean = np.mean([update[name].astype(np.float64) for update in updates], axis=0)
        moved = after.astype(np.float64) - rounds[number - 1][name]
        assert np.abs(moved - mean).max() <= error_bound + 2**-23 * np.abs(after).max()


def test_a_federation_learns_the_mean_and_commits_nothing_else(settings, tiny_model, warm_ray, tmp_path):
    """One of three is silent when masked updates are due in each round; its charges stay, and it closes its run."""
    config, run = settings("federated.rounds=2"), tmp_path / "run"
    signer = coordinator_signer(tmp_path / "state")
    silos = {name: simulated_silo(config, name, tiny_model) for name in NAMES}
    states = {name: Path(silo.silo.state_dir) for name, silo in silos.items()}
    roster = {name: own_signer(silo).public_key for name, silo in silos.items()}
    warm_ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's processes do not find this module
    opener = partial(open_silo, silos, frozenset({signer.public_key}), roster, ("south",))
    with LocalGrid(warm_ray, opener, NAMES, workers=2, threads=1, kept=True) as grid:
        run_federation(grid, config, tiny_model, run, Parties(signer, 3), lambda _: None)
    sums = events(run, "secure_sum")
    assert [(event["summed"], event["dropped"]) for event in sums] == [(["east", "north"], ["south"])] * 2
    written = [path.read_bytes() for path in run.rglob("*") if path.is_file()]
    for number in (1, 2):
        check_mean(run, number, [states["east"], states["north"]], sums[0]["error_bound"])
        for state in states.values():
            update = from_bytes((state / f"update-{number}").read_bytes())
            assert not any(next(iter(update.values())).tobytes()[:256] in content for content in written)
    certificate = json.loads((run / "certificate.json").read_text())
    check_certificate(certificate, "test")
    assert "at least 2 of them honest" in certificate["secure_sum"]
    assert all(sorted(one["releases"]) == ["east", "north"] for one in certificate["model"]["rounds"])
    for name, state in states.items():
        assert kinds(state) == ["open", "reserve", *["charge", "release"] * 2, "close"]
        assert certificate["silos"][name]["statement"]["rounds_charged"] == 2


def test_clients_are_added_up_and_their_aggregator_adds_the_noise_to_a_sum(settings, tiny_model, warm_ray, tmp_path):
    """Round one is lost with the silos' processes; round two is of two of three, and its outcome is computed again."""
    given = ("privacy.unit=client", "privacy.num_clients=3", "evaluate.without_dp=false", "federated.rounds=2")
    more = ("federated.local_steps=8", "privacy.sampling_rate=0.1")  # of 54 records: all empty once in 10^19 times
    config = settings(*given, *more, "federated.min_silos=2", "privacy.max_grad_norm=0.2")
    run, home = tmp_path / "run", tmp_path / "state"
    silos = {name: simulated_silo(config, name, tiny_model) for name in NAMES}
    states = {name: Path(silo.silo.state_dir) for name, silo in silos.items()}
    roster = {name: own_signer(silo).public_key for name, silo in silos.items()}
    signer, seeds = coordinator_signer(home), injected_seeds(SEED, "x")
    warm_ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

    def start(*silent):
        opener = partial(open_silo, silos, frozenset({signer.public_key}), roster, silent)
        ledger = partial(open_ledger, home, tmp_path / "ledger", "notes", config.privacy, seeds)
        with LocalGrid(warm_ray, opener, NAMES, workers=2, threads=1, kept=True) as grid:
            run_federation(grid, config, tiny_model, run, Parties(signer, 3, open_ledger=ledger), lambda _: None)

    with pytest.raises(SiloweaveError, match="1 of 3 silos answered, a secure sum takes 2"):
        start("north", "south")
    with pytest.raises(SiloweaveError, match="the sum of round 1 is lost"):
        start()  # all silos are other processes now
    start("south")
    (lost,), (told,) = events(run, "lost"), events(run, "secure_sum")
    assert lost["round"] == 1 and (told["summed"], told["dropped"]) == (["east", "north"], ["south"])
    rounds = {found.round_number: from_bytes(found.adapter) for found in commits.all_rounds(run)}
    assert all((rounds[1][name] == rounds[0][name]).all() for name in rounds[0])
    words = [np.frombuffer((states[name] / "update-2").read_bytes(), "<u4") for name in ("east", "north")]
    plan, written = plan_terms(config).for_clients(), [path.read_bytes() for path in run.rglob("*") if path.is_file()]
    assert all(one[-64:].any() for one in words)
    assert not any(one.tobytes()[-256:] in content for one in words for content in written)
    charge = next(body for body in bodies(tmp_path / "ledger") if body["kind"] == "charge" and body["round"] == 2)
    streams = Streams(seeds(charge["digest"]), charge["digest"])
    mean = noised_client_mean(words[0] + words[1], plan, client_encoding(plan, 3), streams)
    moved = arrays_of(mean, rounds[1])
    assert all((rounds[2][name] == rounds[1][name] + moved[name]).all() for name in moved)
    certificate = json.loads((run / "certificate.json").read_text())
    check_certificate(certificate, "test")
    assert "under masks" in certificate["left_each_silo"] and "kept to the protocol" in certificate["secure_sum"]
    assert [sorted(one["releases"]) for one in certificate["model"]["rounds"]] == [[], ["aggregator"]]
    assert kinds(tmp_path / "ledger") == ["open", "reserve", "charge", "charge", "release", "close"]
    assert [kinds(states[name]) for name in NAMES] == [["open", "entrust", "unnoised", "unnoised", "close"]] * 3


def test_a_simulation_does_all_of_it_by_itself(settings, tiny_model, warm_ray, tmp_path):
    """With FedAdam and a private evaluation, whose noised sums each silo releases by itself."""
    run = tmp_path / "run"
    config = settings("federated.rounds=1", "federated.aggregation=fedadam", "privacy.evaluations=1")
    simulate(warm_ray, config, tiny_model, run, on_event=lambda _: None)
    check_certificate(json.loads((run / "certificate.json").read_text()), "test")
    assert events(run, "secure_sum")[0]["summed"] == list(NAMES)
    assert events(run, "private_evaluation")[0]["silos"] == list(NAMES)


def test_silos_make_the_noise_together_in_a_simulation(settings, tiny_model, warm_ray, tmp_path):
    """One step a round over all silos' samples, with a private evaluation, whose noise is each silo's own."""
    run, honest = tmp_path / "run", ("privacy.mode=distributed", "privacy.min_honest=2", "federated.colluders=1")
    given = ("federated.rounds=2", "federated.aggregation=fedadam", "federated.optimizer=sgd", "privacy.evaluations=1")
    config = settings(*given, *honest)
    simulate(warm_ray, config, tiny_model, run, on_event=lambda _: None)
    certificate = json.loads((run / "certificate.json").read_text())
    check_certificate(certificate, "test")
    assert "at least 2 of them were honest" in certificate["secure_sum"]
    assert certificate["headline"]["epsilon"] == certificate["epsilon"] <= 4
    sums = events(run, "secure_sum")
    assert [event["summed"] for event in sums] == [list(NAMES)] * 2 and sums[0]["noise_std"] > 0
    assert events(run, "private_evaluation")[0]["silos"] == list(NAMES)
    rounds = {found.round_number: from_bytes(found.adapter) for found in commits.all_rounds(run)}
    assert all((rounds[1][name] != rounds[0][name]).any() for name in rounds[0])


class Service:
    """A silo's service in a process of its own, which is started again when it was killed."""

    def __init__(self, toml, socket, log):
        self._command = [sys.executable, "-c", DYING_SERVICE, str(toml), str(socket), f"{socket}.killed"]
        self._log, self._ended, self.exits = log, threading.Event(), []
        self._start()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _start(self):
        with self._log.open("ab") as log:
            given = {**os.environ, "OMP_NUM_THREADS": "1"}
            self._process = psutil.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=given)

    def _watch(self):
        while not self._ended.is_set():
            try:
                self.exits.append(self._process.wait(0.1))
            except psutil.TimeoutExpired:
                continue
            self._start()

    def end(self):
        self._ended.set()
        self._thread.join()
        end_tree([self._process], 10)


def test_over_flower_a_service_that_is_killed_between_two_phases_drops_out_alone(
    settings, tiny_model, link, sockets, tmp_path
):
    """Two silos are served by threads of this process, the third by its own, which ends when its update is due."""
    config, home = settings("federated.rounds=1", "federated.round_timeout_s=300"), tmp_path / "home"
    run = federation_folder(tmp_path / "run")
    tomls = {name: silo_toml(config, tiny_model, tmp_path / name, home, name) for name in NAMES}
    cards = {name: read_document(EnrolledSilo, home / "silos" / f"{name}.json") for name in NAMES}
    for name, toml in tomls.items():
        for other in set(NAMES) - {name}:
            confirm_silo(load_silo(toml), cards[other])
    silos = {name: WatchedSilo(load_silo(tomls[name]), file=tomls[name]).keeping() for name in NAMES[:2]}
    warm = threading.Lock()  # a process has one warm model

    def answers(silo, content):
        with warm:
            return silo.handle(content)

    servers = [serve(partial(answers, silo), 2**28, f"unix:{sockets}/{name}")[0] for name, silo in silos.items()]
    service = Service(tomls["south"], sockets / "south", tmp_path / "south.log")
    try:
        for name in NAMES:
            link.start_another(name, f"unix:{sockets}/{name}")
        parties = Parties(coordinator_signer(home), 3, partial(enrolled_silos, home))
        run_federation(OneByOne(link.grid), config, tiny_model, run, parties, lambda _: None)
    finally:
        service.end()
        for server in servers:
            server.stop(None).wait()
    assert service.exits == [-9], (tmp_path / "south.log").read_text()[-2000:]
    (told,) = events(run, "secure_sum")
    assert (told["summed"], told["dropped"]) == (["east", "north"], ["south"])
    (refused,) = events(run, "refused")
    assert refused["silo"] == "south" and "was started again since and so drops out of it" in refused["message"]
    check_mean(run, 1, [tmp_path / "east", tmp_path / "north"], told["error_bound"])
    certificate = json.loads((run / "certificate.json").read_text())
    check_certificate(certificate, "test")
    assert sorted(certificate["model"]["rounds"][0]["releases"]) == ["east", "north"]
    assert [kinds(tmp_path / name) for name in NAMES] == [WHOLE_RUN] * 3  # what was charged stays
    assert certificate["silos"]["south"]["statement"]["rounds_charged"] == 1
