"""A coordinator among silos that send what they should not: each is rejected and recorded, and the round goes on."""

import json
import struct
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from configs.events import read_events
from configs.load import load
from federated.adapters.arrays import from_bytes, to_bytes
from federated.coordinator import round_commits as commits
from federated.coordinator.parties import Parties
from federated.coordinator.rounds import run_federation
from federated.identity.trust import coordinator_signer
from federated.protocol import silo_pb2 as pb
from federated.protocol.envelope import seal_reply
from federated.silo.silo import Silo
from federated.simulation.local_grid import LocalGrid
from federated.simulation.simulated_places import simulated_silo
from privacy.certificate.check import check_certificate
from privacy.ledger.statements import Receipt

GOOD = "good"
SILOS = [
    *("bfloat16", "bytes", "forged", GOOD, "header", "huge", "infinite", "nothing spent", "other round", "other silo"),
    *("shape", "stolen receipt"),
]
ARRAYS = {
    "huge": lambda _: np.zeros((4000, 1000), dtype=np.float32),
    "infinite": lambda array: np.full_like(array, np.inf),
    "shape": lambda array: array.T.copy(),
}


class HostileSilo:
    """A real silo whose owner changes what it answers to a request for training."""

    def __init__(self, config, trusted, name):
        self._silo, self._name = Silo(config, trusted), name
        self._first = Path(config.silo.state_dir) / "first-answer"  # the next round may come to another process

    def close(self):
        self._silo.close()

    def handle(self, content):
        answer = self._silo.handle(content)
        reply = pb.Reply.FromString(pb.Envelope.FromString(answer).body)
        if reply.WhichOneof("kind") != "trained":
            return answer
        changed = self._changed(reply, answer)
        if isinstance(changed, bytes):
            return changed
        return seal_reply(self._silo.ledger.journal.signer, changed.SerializeToString())  # it signs what it likes

    def _changed(self, reply, answer):
        if self._name in ARRAYS:
            update = from_bytes(reply.trained.update)
            first = next(iter(update))
            reply.trained.update = to_bytes(update | {first: ARRAYS[self._name](update[first])})
        if self._name == "header":
            reply.trained.update = reply.trained.update[:100]
        if self._name == "bfloat16":
            header = b'{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
            reply.trained.update = struct.pack("<Q", len(header)) + header + bytes(4)  # once a KeyError, at every start
        if self._name == "nothing spent":
            receipt = Receipt.from_bytes(reply.trained.receipt, "test").model_copy(update={"epsilon_reserved": 0.0})
            reply.trained.receipt = receipt.signed(self._silo.ledger.journal.signer).to_bytes()
        if self._name == "other silo":
            reply.silo_id = GOOD
        if self._name == "stolen receipt":
            receipt = json.loads(reply.trained.receipt)
            reply.trained.receipt = json.dumps(receipt | {"epsilon_left": 1e9}).encode()
        if self._name == "forged":
            envelope = pb.Envelope.FromString(answer)
            envelope.signature = "00" * 64
            return envelope.SerializeToString()
        if self._name == "other round":
            if not self._first.exists():
                self._first.write_bytes(answer)
            return self._first.read_bytes()
        return b"\xff" * 100 if self._name == "bytes" else reply


@pytest.fixture
def federation(tiny_run, tmp_path):
    """Settings of two rounds on tiny data, one part for each silo."""
    rows = [{"text": f"note {row} of ward {name}", "silo": name} for name in SILOS for row in range(60)]
    source = tmp_path / "notes.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load(
        "tiny",
        [
            f'data.private.source="{source}"',
            "data.private.public_record_counts={}",
            "data.private.public_record_count=100",
            f"federated.state_dir={tmp_path / 'state'}",
            "federated.rounds=2",
            "federated.local_steps=1",
            "privacy.epsilon=4",
        ],
    )


def test_hostile_replies_change_nothing_and_the_round_goes_on(federation, tiny_model, warm_ray, tmp_path):
    config = federation
    signer = coordinator_signer(Path(config.federated.state_dir))
    silos = {name: simulated_silo(config, name, tiny_model) for name in SILOS}
    trusted = frozenset({signer.public_key})

    def open_silo(silos, trusted, name):
        return HostileSilo(silos[name], trusted, name)

    opener = partial(open_silo, silos, trusted)
    with LocalGrid(warm_ray, opener, SILOS, workers=2, threads=1) as grid:
        run_federation(grid, config, tiny_model, tmp_path / "run", Parties(signer, len(SILOS)), lambda _: None)
    events = list(read_events(tmp_path / "run" / "events.jsonl"))
    answered = [event["answered"] for event in events if event["event"] == "round"]
    assert answered == [sorted([GOOD, "other round"]), [GOOD]]  # a replayed answer is sound once
    rejected = {}
    for event in events:
        if event["event"] == "rejected":
            rejected.setdefault(event.get("silo", "bytes"), []).append(event["message"])
    assert set(rejected) == set(SILOS) - {GOOD}
    assert [len(rejected[name]) for name in sorted(set(rejected) - {"other round"})] == [2] * (len(SILOS) - 2)
    words = {
        "bfloat16": "is BF16, expected is F32",
        "forged": "not signed by the silo",
        "header": "not safetensors",
        "huge": "bytes, one to this request has at most",
        "infinite": "not finite",
        "nothing spent": "receipt of silo nothing spent.epsilon_reserved is 0.0, expected",
        "other round": "not to this request",
        "other silo": "not to this request",
        "shape": "names or shapes",
        "stolen receipt": "signature doesn't hold",
    }
    assert {name: word for name, word in words.items() if word not in rejected[name][-1]} == {}
    rounds = commits.all_rounds(tmp_path / "run")
    assert [found.round_number for found in rounds] == [0, 1, 2]
    assert all(np.isfinite(array).all() for array in from_bytes(rounds[-1].adapter).values())
    # What was rejected stays charged and claimed: the silos did release it.
    certificate = json.loads((tmp_path / "run" / "certificate.json").read_text())
    assert set(certificate["silos"]) == set(SILOS)
    assert [set(found["releases"]) for found in certificate["model"]["rounds"]] == [set(names) for names in answered]
    check_certificate(certificate, "test")


class SlowSilo:
    """A silo that trains, and keeps its reply until a file is there."""

    def __init__(self, silo, until):
        self._silo, self._until = silo, until

    def close(self):
        self._silo.close()

    def handle(self, content):
        answer = self._silo.handle(content)
        trained = pb.Reply.FromString(pb.Envelope.FromString(answer).body).WhichOneof("kind") == "trained"
        while trained and not self._until.exists():
            time.sleep(0.05)
        return answer


def test_a_round_ends_with_enough_replies_and_the_late_one_stays_charged(federation, tiny_model, warm_ray, tmp_path):
    """The slow silo answers only once the first round is over without it; it is asked again, and closes in the end."""
    config = federation.model_copy(
        update={"federated": federation.federated.model_copy(update={"enough_silos": 1, "round_timeout_s": 120.0})}
    )
    names, signer = (GOOD, "slow"), coordinator_signer(Path(config.federated.state_dir))
    source = tmp_path / "slow.jsonl"
    source.write_text("".join(json.dumps({"text": f"note {n}", "silo": s}) + "\n" for s in names for n in range(60)))
    silos = {}
    for name in names:
        silo = simulated_silo(config, name, tiny_model)
        silos[name] = silo.model_copy(update={"data": silo.data.model_copy(update={"source": str(source)})})
    over, trusted = tmp_path / "over", frozenset({signer.public_key})

    def open_silo(silos, trusted, over, name):
        silo = Silo(silos[name], trusted)
        return SlowSilo(silo, over) if name == "slow" else silo

    def listen(event):
        if event["event"] == "round":
            over.touch()

    with LocalGrid(warm_ray, partial(open_silo, silos, trusted, over), names, workers=2, threads=1) as grid:
        run_federation(grid, config, tiny_model, tmp_path / "run", Parties(signer, 2), listen)
    events = list(read_events(tmp_path / "run" / "events.jsonl"))
    answered = [event["answered"] for event in events if event["event"] == "round"]
    assert answered[0] == [GOOD]
    assert len(answered) == 2 and len(answered[1]) == 1
    lost = [event for event in events if event["event"] in ("timeout", "rejected", "refused")]
    assert not lost, lost
    certificate = json.loads((tmp_path / "run" / "certificate.json").read_text())
    check_certificate(certificate, "test")
    # The late reply was released, so it is charged and claimed, though no average has it.
    assert certificate["silos"]["slow"]["statement"]["rounds_charged"] >= 1
