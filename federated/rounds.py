"""The coordinator's rounds: reserve, train, fold, commit, close. The same code over the local grid and over Flower."""

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from configs.artifacts import canonical_json, digest_bytes, require_manifest, write_atomic
from configs.encryption import load_key
from configs.errors import PolicyRefusal, SiloweaveError
from configs.events import EventLog
from configs.load import config_digest, parse
from configs.schema import RunConfig
from federated import commits
from federated import silo_pb2 as pb
from federated.adapters import Arrays, from_bytes, to_bytes
from federated.aggregation import Aggregation, Sent, check_size
from federated.client_app import pack, unpack
from federated.factors import frozen_digest
from federated.protocol import PROTOCOL_VERSION
from privacy.certificate import certificate
from privacy.plan import PlanRequest
from privacy.statements import Receipt, RunStatement, Signed
from privacy.truncation import units_for
from trainer.tasks import CausalTask

POLL_S = 0.05
TRAIN, QUERY = "train", "query"


def plan_request(config: RunConfig) -> PlanRequest:
    """The plan that the settings ask for: noise calibrated to epsilon over the whole schedule.

    Raises:
        InputError: no noise multiplier reaches the epsilon, or the settings make no consistent plan.
    """
    privacy, federated, private = config.privacy, config.federated, config.data.private
    largest = max(private.public_record_count, *private.public_record_counts.values(), 0)
    cap: dict[str, int] = {}
    if privacy.sampler == "truncated_poisson":
        max_units = units_for(largest, federated.rounds, privacy.delta)
        cap = {"max_batch_size": privacy.max_batch_size, "max_units": max_units}
    tree = {
        "unit": privacy.unit,
        "sampler": privacy.sampler,
        "sampling_rate": privacy.sampling_rate,
        "max_grad_norm": privacy.max_grad_norm,
        "clipping_function": privacy.clipping_function,
        "target_quantile": privacy.target_quantile,
        "noise_multiplier": 1.0,  # until it is calibrated
        "rounds": federated.rounds,
        "steps_per_round": federated.local_steps,
        "delta": privacy.delta,
        **cap,
    }
    return parse(PlanRequest, tree, "privacy").calibrated(privacy.epsilon)


@dataclass
class Coordinator:
    """One run of a federation.

    Attributes:
        grid: reaches the silos' nodes.
        config: the run's settings.
        base_model: exported model directory.
        directory: receives the rounds' commits, the certificate and the final adapter.
        num_silos: nodes to wait for.
        log: receives one event a round, refusal or rejected reply.
        certify: write a certificate; False for the comparison without DP.
    """

    grid: Grid
    config: RunConfig
    base_model: Path
    directory: Path
    num_silos: int
    log: EventLog
    certify: bool = True
    run_id: str = field(init=False)
    plan: PlanRequest = field(init=False)
    model_digest: str = field(init=False)
    nodes: dict[str, int] = field(default_factory=dict)
    silos: dict[str, dict[str, Any]] = field(default_factory=dict)
    server_state: Arrays = field(default_factory=dict)
    bytes_moved: int = 0

    def __post_init__(self) -> None:
        check_size(self.config.federated, self.num_silos)
        self.run_id = run_id(self.directory)
        self.plan = plan_request(self.config)
        self.model_digest = require_manifest(self.base_model, "model", "export").content_digest

    def run(self, initial_adapter: Callable[[], Arrays]) -> None:
        """All rounds, from the one after the newest commit.

        Raises:
            PolicyRefusal: fewer than ``federated.min_silos`` silos are left because policies refuse.
            SiloweaveError: fewer are left for another reason.
        """
        digest, key = config_digest(self.config), load_key(self.config.run.encryption_key_file)
        say = partial(self.log.emit, "federate", "damaged")
        commit = commits.newest(self.directory, digest, lambda line: say(message=line), key)
        if commit is None:
            commit = commits.save(self.directory, digest, 0, to_bytes(initial_adapter()), {}, self.run_id, key)
        self.silos = commit.silos  # one that has spent stays in the certificate, whoever is there today
        self._discover()
        self._reserve()
        adapter = from_bytes(commit.adapter)
        self.server_state = from_bytes(commit.server_state) if commit.server_state else {}
        for round_number in range(commit.round_number + 1, self.plan.rounds + 1):
            began, self.bytes_moved = time.perf_counter(), 0
            adapter, answered = self._round(round_number, adapter)
            self.log.emit(
                "federate",
                "round",
                round=round_number,
                rounds=self.plan.rounds,
                answered=answered,
                bytes=self.bytes_moved,
                seconds=time.perf_counter() - began,
            )
            state = to_bytes(self.server_state) if self.server_state else b""
            commits.save(self.directory, digest, round_number, to_bytes(adapter), self.silos, self.run_id, key, state)
        self._close()
        if self.certify:
            self._certify()

    def _certify(self) -> None:
        reserved = {
            name: silo for name, silo in self.silos.items() if silo.get("receipt", {}).get("epsilon_reserved", 0) > 0
        }
        document = certificate(self.run_id, self.plan, reserved)
        write_atomic(self.directory / "certificate.json", json.dumps(document, indent=2, sort_keys=True).encode())

    def _discover(self) -> None:
        deadline = time.monotonic() + self.config.federated.round_timeout_s
        while len(node_ids := list(self.grid.get_node_ids())) < self.num_silos:
            if time.monotonic() > deadline:
                raise SiloweaveError(f"{len(node_ids)} of {self.num_silos} silos have connected; start the others")
            time.sleep(1)
        body = pb.Request(version=PROTOCOL_VERSION, request_id="describe", describe=pb.Describe()).SerializeToString()
        for node, reply in self._exchange(dict.fromkeys(node_ids, body), QUERY, "describe"):
            if reply.WhichOneof("kind") != "described":
                self.log.emit("federate", "rejected", node=node, step="describe", message=reply.refusal.message)
                continue
            described = reply.described
            self.nodes[reply.silo_id] = node
            self.silos.setdefault(reply.silo_id, {}).update(
                dataset_id=described.dataset_id,
                public_key=described.public_key,
                public_record_count=described.public_record_count,
            )

    def _reserve(self) -> None:
        text = json.dumps(self.plan.model_dump(), sort_keys=True)
        bodies = self._bodies("reserve", reserve=pb.Reserve(plan=text))
        self._collect(bodies, QUERY, "reserve", lambda silo, reply: self._receipt(silo, reply.reserved.receipt))

    def _round(self, round_number: int, adapter: Arrays) -> tuple[Arrays, list[str]]:
        aggregation = Aggregation(self.config.federated, adapter, self.server_state, len(self.silos))
        frozen = frozen_digest(adapter) if self.config.federated.adapters == "ffa" else ""

        def fold(silo: str, reply: pb.Reply) -> None:
            self._receipt(silo, reply.trained.receipt)  # an update without a sound receipt is not folded
            aggregation.add(silo, from_bytes(reply.trained.update))

        bodies = {
            silo: self._body(
                silo, f"round-{round_number}", train=self._train(round_number, aggregation.sent(silo), frozen)
            )
            for silo in sorted(self.nodes)
        }
        answered = self._collect(bodies, TRAIN, str(round_number), fold)
        adapter, self.server_state = aggregation.result()
        return adapter, answered

    def _train(self, round_number: int, sent: Sent, frozen: str) -> pb.Train:
        federated = self.config.federated
        seed = self.config.run.seed if frozen else 0
        return pb.Train(
            round=round_number,
            plan_digest=self.plan.digest,
            base_model_digest=self.model_digest,
            task=CausalTask.name,
            adapter_spec=pb.AdapterSpec(rank=sent.rank, alpha=sent.alpha, frozen_digest=frozen, frozen_seed=seed),
            adapter=to_bytes(sent.adapter),
            learning_rate=federated.learning_rate,
            optimizer=federated.optimizer,
            proximal_mu=federated.proximal_mu,
            correction=to_bytes(sent.correction) if sent.correction else b"",
        )

    def _close(self) -> None:
        bodies = self._bodies("close", close=pb.Close())
        self._collect(bodies, QUERY, "close", self._closed)

    def _closed(self, silo: str, reply: pb.Reply) -> None:
        self._receipt(silo, reply.closed.receipt)
        if self.certify and reply.closed.statement:
            statement = RunStatement.from_bytes(reply.closed.statement, f"statement of silo {silo}")
            self._check_signed(silo, statement, statement.run)
            self.silos[silo]["statement"] = statement.model_dump(mode="json")

    def _receipt(self, silo: str, content: bytes) -> None:
        """Keeps a silo's newest receipt: it goes back to the silo with the next request, and into the certificate."""
        if not self.certify:
            return
        receipt = Receipt.from_bytes(content, f"receipt of silo {silo}")
        self._check_signed(silo, receipt, receipt.run)
        held = self.silos[silo].get("receipt", {})
        if (receipt.epoch, receipt.number) >= (held.get("epoch", 0), held.get("number", 0)):
            self.silos[silo]["receipt"] = receipt.model_dump(mode="json")

    def _check_signed(self, silo: str, signed: Signed, run: str) -> None:
        known = self.silos[silo]["public_key"]
        if (signed.silo, signed.public_key, run) != (silo, known, self.run_id) or not signed.holds():
            raise ValueError("its receipt or statement is of another run, or not signed with the key that it gave")

    def _held(self, node: int) -> bytes:
        """The last signed receipt of the silo behind a node; nothing where there is none."""
        receipts = (self.silos[silo].get("receipt", {}) for silo, at in self.nodes.items() if at == node)
        return next((canonical_json(receipt) for receipt in receipts if "signature" in receipt), b"")

    def _bodies(self, request_id: str, **kind: Any) -> dict[str, bytes]:
        """The same request to every silo."""
        return {silo: self._body(silo, request_id, **kind) for silo in sorted(self.nodes)}

    def _body(self, silo: str, request_id: str, **kind: Any) -> bytes:
        """One silo's request. The same step of the same run has the same bytes, so a restart asks nothing new."""
        request = pb.Request(version=PROTOCOL_VERSION, run_id=self.run_id, silo_id=silo, request_id=request_id, **kind)
        return request.SerializeToString(deterministic=True)

    def _collect(
        self, bodies: Mapping[str, bytes], kind: str, group: str, accept: Callable[[str, pb.Reply], None]
    ) -> list[str]:
        """Sends the requests and accepts each sound reply as it comes; the others are recorded and passed over.

        Raises:
            PolicyRefusal: too few silos are left, and a policy refused.
            SiloweaveError: too few silos are left.
        """
        silo_of = {self.nodes[silo]: silo for silo in bodies}
        answered: list[str] = []
        refusals: list[PolicyRefusal] = []
        for node, reply in self._exchange({self.nodes[silo]: body for silo, body in bodies.items()}, kind, group):
            silo = silo_of[node]
            try:
                self._check(silo, reply, digest_bytes(bodies[silo]))
                accept(silo, reply)
                answered.append(silo)
            except PolicyRefusal as refusal:
                refusals.append(refusal)
                self.log.emit("federate", "refused", silo=silo, step=group, rule=refusal.rule, message=str(refusal))
            except ValueError as error:
                self.log.emit("federate", "rejected", silo=silo, step=group, message=str(error))
        if len(answered) < self.config.federated.min_silos:
            message = f"step {group}: {len(answered)} of {len(bodies)} silos answered, federated.min_silos is "
            message += f"{self.config.federated.min_silos}"
            if refusals:
                first = refusals[0]
                raise PolicyRefusal(f"{message}; {first}", rule=first.rule, asked=first.asked, allowed=first.allowed)
            raise SiloweaveError(
                f"{message}; see {self.log.path} and the silos' own logs, then run the same command again"
            )
        return sorted(answered)

    def _check(self, silo: str, reply: pb.Reply, request_digest: str) -> None:
        kind = reply.WhichOneof("kind")
        if kind == "refusal":
            refusal = reply.refusal
            message = f"silo {silo} refuses: {refusal.message}"
            raise PolicyRefusal(message, rule=refusal.rule, asked=refusal.asked, allowed=refusal.allowed)
        if reply.silo_id != silo or reply.request_digest != request_digest:
            raise ValueError("the reply is not to this request")
        if kind not in ("reserved", "trained", "closed"):
            raise ValueError(f"the reply is {kind}: {reply.failure.code}")

    def _exchange(self, bodies: Mapping[int, bytes], kind: str, group: str) -> Iterator[tuple[int, pb.Reply]]:
        """Sends one body a node and yields (node, reply) as they come, until all have or time is up."""
        contents = {node: (body, self._held(node)) for node, body in bodies.items()}
        messages = [Message(pack(*content), node, kind, group_id=group) for node, content in contents.items()]
        self.bytes_moved += sum(len(body) + len(receipt) for body, receipt in contents.values())
        waiting = set(self.grid.push_messages(messages))
        deadline = time.monotonic() + self.config.federated.round_timeout_s
        while waiting and time.monotonic() < deadline:
            for message in self.grid.pull_messages(waiting):
                waiting.discard(message.metadata.reply_to_message_id)
                node = message.metadata.src_node_id
                reply = self._parse(message, node, group)
                if reply is not None:
                    yield node, reply
            if waiting:
                time.sleep(POLL_S)
        if waiting:
            self.log.emit("federate", "timeout", step=group, missing=len(waiting))

    def _parse(self, message: Message, node: int, group: str) -> pb.Reply | None:
        reply = pb.Reply()
        try:
            if message.has_error():
                raise ValueError(f"Flower reports {message.error.code}: {message.error.reason}")
            body, _ = unpack(message.content)
            self.bytes_moved += len(body)
            reply.ParseFromString(body)
        except Exception as error:  # protobuf's DecodeError lives in an untyped module
            self.log.emit("federate", "rejected", node=node, step=group, message=str(error)[:500])
            return None
        return reply


def run_id(directory: Path) -> str:
    """The id under which silos know this run; made at its first start and kept for its restarts."""
    path = directory / "run.json"
    if not path.exists():
        write_atomic(path, json.dumps({"run_id": uuid.uuid4().hex}).encode())
    return str(json.loads(path.read_text(encoding="utf-8"))["run_id"])
