"""Silos that make the noise together over Flower's SuperLink with TLS, and a coordinator that is killed between phases.

The coordinator's program is a process of its own, which ends as `kill -9` does it; the three silos are real ones.
"""

import json
import os
import subprocess
import sys
import threading
from collections import defaultdict
from functools import partial

import numpy as np
import psutil
import pytest
from flower_processes import RUN_S, silo_toml
from flower_processes import federation as federation_folder

from configs.events import read_events
from configs.load import load
from configs.parse import to_toml
from configs.schema.silo import load_silo
from federated.adapters.arrays import from_bytes
from federated.coordinator import round_commits as commits
from federated.deployment.silo_site import confirm_silo
from federated.deployment.supervisor import end_tree
from federated.identity.cards import EnrolledSilo, read_document
from federated.silo.silo import Silo
from federated.transport.service import serve
from privacy.certificate.check import check_certificate
from privacy.distributed.planned import of_length
from privacy.ledger.chain import verify_entries
from privacy.ledger.file import read_only
from privacy.plan_from_settings import plan_terms

NAMES, ROUNDS, COUNT = ("east", "north", "south"), 2, 100
SUMS = (("round", 1), ("round", 2), ("held_out", 1))
# The sum and the phase whose answers have all come when the coordinator ends itself, as kill -9 would. They are not on
# disk yet. Round 2 was unmasked before it, and nothing of either is committed.
KILLED = ("secure-evaluation.json", 1, "MASKED")
COORDINATOR = """
import json, os, signal, sys, tomllib
from functools import partial
from pathlib import Path
import torch
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid
from configs.parse import parse
from configs.schema.schema import RunConfig
from federated.coordinator.flower_grid import OneByOne
from federated.coordinator.parties import Parties
from federated.coordinator.rounds import run_federation
from federated.coordinator.secure.sum_record import SumRecord
from federated.identity.trust import coordinator_signer, enrolled_silos
given = json.loads(sys.argv[1])
torch.set_num_threads(1)
passed_on = SumRecord.passed_on
def dying(record, phase, names):
    if [record.name, record.round, phase.name] == given["killed"]:
        os.kill(os.getpid(), signal.SIGKILL)
    passed_on(record, phase, names)
SumRecord.passed_on = dying
TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = given["run_id"], 1, given["task_id"]
grid = HttpGrid(given["address"], root_certificates=Path(given["root"]).read_bytes(), token=given["token"])
grid.set_run(Run.create_empty(given["run_id"]))
config = parse(RunConfig, tomllib.loads(given["config"]), "config")
home = Path(given["home"])
parties = Parties(coordinator_signer(home), 3, partial(enrolled_silos, home))
run_federation(OneByOne(grid), config, Path(given["model"]), Path(given["run"]), parties, lambda _: None)
"""


class WatchedSilo(Silo):
    """A real silo that keeps, for the test, what it was asked, what it answered, and the words of each of its sums."""

    def watched(self):
        begun, self.words, self.answers = self._masking.begun, defaultdict(list), defaultdict(set)

        def watched(agreement, update, plan_digest, release):
            self.words[release[4] or "round", release[3]].append(update.copy())
            return begun(agreement, update, plan_digest, release)

        self._masking.begun = watched
        return self

    def _dispatch(self, request, digest):
        body = super()._dispatch(request, digest)
        self.answers[request.request_id].add((digest, body))
        return body


@pytest.fixture
def settings(tmp_path):
    rows = [{"text": f"note {row} of ward {name}", "silo": name} for name in NAMES for row in range(60)]
    source = tmp_path / "notes.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = ("secure_aggregation=true", "colluders=1", "optimizer=sgd", "local_steps=1", f"rounds={ROUNDS}")
    return load(
        "tiny",
        [
            f'data.private.source="{source}"',
            "data.private.public_record_counts={}",
            f"data.private.public_record_count={COUNT}",
            f"federated.state_dir={tmp_path / 'state'}",
            f"federated.round_timeout_s={RUN_S}",
            *(f"federated.{given}" for given in shared),
            "privacy.mode=distributed",
            "privacy.min_honest=2",
            "privacy.evaluations=1",
            "privacy.sampling_rate=0.1",
        ],
    )


def coordinate(link, settings, model, folder, killed):
    """The coordinator's program from its start to its end, or to its death."""
    given = {
        "address": f"127.0.0.1:{link.port}",
        "root": str(link.folder / "ca.pem"),
        "token": link.token,
        "run_id": link.run_id,
        "task_id": link.task_id,
        "config": to_toml(settings),
        "model": str(model),
        "home": str(folder / "home"),
        "run": str(folder / "run"),
        "killed": killed,
    }
    log = folder / "coordinator.log"
    with log.open("ab") as out:
        command = [sys.executable, "-c", COORDINATOR, json.dumps(given)]
        process = psutil.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=dict(os.environ))
    try:
        return process.wait(RUN_S), log
    finally:
        end_tree([process], 10)


def test_a_coordinator_that_is_killed_between_phases_gets_the_same_sums_and_nothing_is_spent_twice(
    settings, tiny_model, link, sockets, tmp_path
):
    home, run = tmp_path / "home", federation_folder(tmp_path / "run")
    tomls = {name: silo_toml(settings, tiny_model, tmp_path / name, home, name) for name in NAMES}
    cards = {name: read_document(EnrolledSilo, home / "silos" / f"{name}.json") for name in NAMES}
    for name, toml in tomls.items():
        for other in set(NAMES) - {name}:
            confirm_silo(load_silo(toml), cards[other])
    silos = {name: WatchedSilo(load_silo(toml), file=toml).watched() for name, toml in tomls.items()}
    warm = threading.Lock()  # a process has one warm model

    def answers(silo, content):
        with warm:
            return silo.handle(content)

    servers = [serve(partial(answers, silo), 2**28, f"unix:{sockets}/{name}")[0] for name, silo in silos.items()]
    try:
        for name in NAMES:
            link.start_another(name, f"unix:{sockets}/{name}")
        status, log = coordinate(link, settings, tiny_model, tmp_path, list(KILLED))
        assert status == -9, log.read_text()[-3000:]
        assert commits.all_rounds(run)[-1].round_number == ROUNDS - 1
        status, log = coordinate(link, settings, tiny_model, tmp_path, [])
        assert status == 0, log.read_text()[-3000:]
    finally:
        for server in servers:
            server.stop(None).wait()
    check_sums(settings, silos, run)
    for name, silo in silos.items():
        # One charge for each, whatever was asked again, and one client of the protocol, so masks and noise of its own.
        assert kinds(tmp_path / name) == ["open", "reserve", *["charge", "release"] * (ROUNDS + 1), "close"]
        assert {of: len(words) for of, words in silo.words.items()} == dict.fromkeys(SUMS, 1)
        assert not (silo.words[SUMS[0]][0] == silo.words[SUMS[1]][0]).all()
        # What was asked again has had the same question and the same answer, to the bit: so no share of a second kind.
        for request, found in silo.answers.items():
            assert len(found) == 1 or request in ("describe", "reserve", "close"), request
        assert {"round-1-revealed", "round-2-revealed", "evaluation-1-revealed"} <= set(silo.answers)
    (shown,) = [event for event in read_events(run / "events.jsonl") if event["event"] == "private_evaluation"]
    assert shown["silos"] == list(NAMES) and shown["error_bound"] < 1e-3
    certificate = json.loads((run / "certificate.json").read_text())
    check_certificate(certificate, "test")
    assert "at least 2 of them were honest" in certificate["secure_sum"]
    assert certificate["headline"]["epsilon"] <= settings.privacy.epsilon
    assert all(silo["statement"]["rounds_charged"] == ROUNDS for silo in certificate["silos"].values())


def flat(adapter):
    return np.concatenate([adapter[name].ravel() for name in sorted(adapter)])


def kinds(state_dir):
    path = state_dir / "ledger.sqlite"
    return [body["kind"] for body in verify_entries(read_only(path), str(path))]


def check_sums(settings, silos, run):
    """Each round has moved the model by exactly what the sum of the silos' words says, and by nothing else."""
    rounds = {found.round_number: from_bytes(found.adapter) for found in commits.all_rounds(run)}
    length = sum(array.size for array in rounds[0].values())
    noise = of_length(plan_terms(settings).noise, length)
    for number in range(1, ROUNDS + 1):
        words = [silo.words["round", number][0] for silo in silos.values()]
        step = noise.decode(np.sum(words, axis=0, dtype=words[0].dtype))
        batch = settings.privacy.sampling_rate * COUNT * len(silos)
        before, after = (
            np.concatenate([rounds[n][name].ravel() for name in sorted(rounds[n])]) for n in (number - 1, number)
        )
        expected = before - settings.federated.learning_rate * step / batch
        assert np.abs(after - expected).max() <= 1e-6 * max(1.0, np.abs(expected).max())
        assert (after != before).any()
    sums = [event for event in read_events(run / "events.jsonl") if event["event"] == "secure_sum"]
    assert [event["summed"] for event in sums[-ROUNDS:]] == [list(NAMES)] * ROUNDS
