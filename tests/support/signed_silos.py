"""Silos that hold a key each and answer what a test likes, behind a grid in this process: no data, no model, no ledger.

What they sign is what an honest silo's ledger would; a test that wants another answer changes it, and signs that.
"""

import numpy as np
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity
from silo_requests import signer_of

from configs.events import EventLog
from configs.load import load
from configs.storage.files import digest_bytes
from configs.storage.manifests import Manifest, commit_manifest
from federated.adapters.arrays import to_bytes
from federated.coordinator.parties import Parties
from federated.coordinator.rounds import Coordinator
from federated.protocol import silo_pb2 as pb
from federated.protocol.envelope import seal_reply
from federated.protocol.framing import PROTOCOL_VERSION
from federated.transport.flower_messages import pack, unpack
from privacy.ledger.statements import Receipt, RunStatement, Spend
from privacy.plan import PlanTerms

COUNT = 1000
NAMES = ("base_model.model.a.lora_A.default.weight", "base_model.model.a.lora_B.default.weight")


def adapter():
    """A small shared adapter."""
    return {NAMES[0]: np.full((4, 3), 0.25, np.float32), NAMES[1]: np.zeros((5, 4), np.float32)}


class SignedSilo:
    """One silo. ``change`` gets a finished reply and its request, and gives what is sent instead: a reply or bytes."""

    def __init__(self, name, change=None, value=0.5):
        self.name, self.change, self.value = name, change, value
        self.signer = signer_of(digest_bytes(name.encode())[:32].encode())
        self.number, self.plan = 1, None
        self.charged, self.mandate = 0, None

    def receipt(self, run, /, **values):
        """What an honest ledger of one reservation would show now."""
        epsilon, delta = (self.plan.epsilon, self.plan.delta) if self.plan else (0.0, 0.0)
        spends = (Spend(entry="e" * 64, epsilon=epsilon, delta=delta),) if self.plan else ()
        given = {
            "silo": self.name,
            "dataset": f"ward-{self.name}",
            "public_key": self.signer.public_key,
            "run": run,
            "number": self.number,
            "head": digest_bytes(f"{self.name} {self.number}".encode()),
            "epoch": 0,
            "plan_digest": self.plan.digest if self.plan else "",
            "public_record_count": COUNT if self.plan else 0,
            "epsilon_reserved": epsilon,
            "delta_reserved": delta,
            "epsilon_left": 32 - epsilon,
            "delta_left": 1e-4 - delta,
            "mandate": self.mandate.digest if self.mandate else "",
            "spends": spends,
        }
        return Receipt(**{**given, **values}).signed(self.signer)

    def statement(self, run, /, **values):
        """What it would state of the closed run."""
        given = {
            "silo": self.name,
            "dataset": f"ward-{self.name}",
            "public_key": self.signer.public_key,
            "run": run,
            "plan_digest": self.plan.digest,
            "public_record_count": COUNT,
            "epsilon": self.plan.epsilon,
            "delta": self.plan.delta,
            "rounds_charged": self.charged,
            "number": self.number,
            "head": digest_bytes(f"{self.name} {self.number}".encode()),
            "attests_disjoint_units": True,
            "seed_source": "operating system",
            "versions": {"torch": "2"},
            "mandate": self.mandate.digest if self.mandate else "",
        }
        return RunStatement(**{**given, **values}).signed(self.signer)

    def handle(self, content):
        body = pb.Envelope.FromString(content).body
        request = pb.Request.FromString(body)
        reply = pb.Reply(version=PROTOCOL_VERSION, silo_id=self.name, request_digest=digest_bytes(body))
        self.answer(request, reply)
        sent = self.change(self, reply, request) if self.change else reply
        return sent if isinstance(sent, bytes) else seal_reply(self.signer, sent.SerializeToString())

    def answer(self, request, reply):
        kind, run = request.WhichOneof("kind"), request.run_id
        if kind == "describe":
            key = self.signer.public_key
            told = pb.Described(dataset_id=f"ward-{self.name}", public_key=key, public_record_count=COUNT)
            reply.described.CopyFrom(told)
            return
        self.number += 1
        if kind == "reserve":
            self.plan = PlanTerms.model_validate_json(request.reserve.plan)
            reply.reserved.receipt = self.receipt(run).to_bytes()
            reply.reserved.mandate = self.mandate.to_bytes() if self.mandate else b""
        elif kind == "train":
            self.charged = max(self.charged, request.train.round)
            reply.trained.receipt = self.receipt(run).to_bytes()
            reply.trained.update = to_bytes({n: np.full_like(a, self.value) for n, a in adapter().items()})
        elif kind == "close":
            reply.closed.receipt = self.receipt(run).to_bytes()
            reply.closed.statement = self.statement(run).to_bytes()


class InProcess:
    """A grid whose nodes answer at once; ``message_of`` makes a node's message of what its silo has answered."""

    def __init__(self, silos, message_of=None):
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.silos = dict(enumerate(silos, 1))
        self.message_of = message_of or (lambda content, asked: Message(pack(content), reply_to=asked))
        self._asked, self._sent = {}, 0

    def get_node_ids(self):
        return list(self.silos)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = str(self._sent)
            self._asked[str(self._sent)] = message
            ids.append(str(self._sent))
        return ids

    def pull_messages(self, message_ids):
        asked = [self._asked.pop(one) for one in list(message_ids) if one in self._asked]
        return [self.message_of(self.silos[one.metadata.dst_node_id].handle(unpack(one.content)), one) for one in asked]


def coordinator(grid, folder, *overrides, silos=None):
    """A coordinator over these silos, its base model an empty folder."""
    base = folder / "model"
    base.mkdir(parents=True, exist_ok=True)
    commit_manifest(base, Manifest("model", "", metadata={"context_length": 16}))
    settings = ("federated.rounds=2", "federated.local_steps=1", "privacy.epsilon=2", "federated.round_timeout_s=5")
    config = load("tiny", [*settings, *overrides])
    parties = Parties(signer_of(bytes(range(32))), silos or len(grid.silos))
    return Coordinator(grid, config, base, folder / "run", parties, EventLog(folder / "run" / "events.jsonl"))
