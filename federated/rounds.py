"""The coordinator's rounds: reserve, train, fold, commit, close. The same code over the local grid and over Flower."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from configs.artifacts import Manifest, canonical_json, require_manifest, write_atomic
from configs.encryption import load_key
from configs.errors import SiloweaveError
from configs.events import EventLog
from configs.load import config_digest, parse
from configs.schema import RunConfig
from federated import commits
from federated import silo_pb2 as pb
from federated.adapters import Arrays, from_bytes, to_bytes
from federated.aggregation import Aggregation, Sent, check_size
from federated.exchange import QUERY, TRAIN, Bodies, Exchange, Parties
from federated.factors import frozen_digest
from federated.private_evaluation import METRIC, bounds_of, checked_sums, figures
from federated.runs import open_run
from privacy.certificate import certificate
from privacy.plan import PlanRequest
from privacy.statements import Receipt, RunStatement, Signed
from privacy.truncation import units_for
from trainer.tasks import CausalTask


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
    metrics = []
    if privacy.evaluations:
        noise, labels = privacy.evaluation_noise_multiplier, privacy.evaluation_labels
        metrics = [{"name": METRIC, "noise_multiplier": noise, "releases": privacy.evaluations, "labels": labels}]
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
        "metric_releases": metrics,
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
        parties: the coordinator's key, and the silos.
        log: receives one event a round, refusal or rejected reply.
        certify: write a certificate; False for the comparison without DP.
    """

    grid: Grid
    config: RunConfig
    base_model: Path
    directory: Path
    parties: Parties
    log: EventLog
    certify: bool = True
    exchange: Exchange = field(init=False)
    plan: PlanRequest = field(init=False)
    base: Manifest = field(init=False)
    silos: dict[str, dict[str, Any]] = field(default_factory=dict)
    reserved: set[str] = field(default_factory=set)
    server_state: Arrays = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_size(self.config.federated, self.parties.num_silos)
        run = open_run(self.directory, self.config.federated.run_lifetime_h)
        settings, held = self.config.federated, self._held
        self.exchange = Exchange(self.grid, run, self.parties, settings, self.log, held)
        self.plan = plan_request(self.config)
        self.base = require_manifest(self.base_model, "model", "export")

    def run(self, initial_adapter: Callable[[], Arrays]) -> None:
        """All rounds, from the one after the newest commit.

        Raises:
            PolicyRefusal: fewer than ``federated.min_silos`` silos are left because policies refuse.
            SiloweaveError: fewer are left for another reason.
        """
        digest, key = config_digest(self.config), load_key(self.config.run.encryption_key_file)
        run_id = self.exchange.run.id
        say = partial(self.log.emit, "federate", "damaged")
        commit = commits.newest(self.directory, digest, lambda line: say(message=line), key)
        if commit is None:
            commit = commits.save(self.directory, digest, 0, to_bytes(initial_adapter()), {}, run_id, key)
        self.silos = commit.silos  # one that has spent stays in the certificate, whoever is there today
        self._wait_for_silos(self.parties.num_silos)
        self._meet()
        adapter = from_bytes(commit.adapter)
        self.server_state = from_bytes(commit.server_state) if commit.server_state else {}
        if commit.round_number == 0:
            self._evaluate(0, None)
        for round_number in range(commit.round_number + 1, self.plan.rounds + 1):
            began, self.exchange.bytes_moved = time.perf_counter(), 0
            adapter, answered = self._round(round_number, adapter)
            self._evaluate(round_number, adapter)
            self.log.emit(
                "federate",
                "round",
                round=round_number,
                rounds=self.plan.rounds,
                answered=answered,
                bytes=self.exchange.bytes_moved,
                seconds=time.perf_counter() - began,
                epsilon_left=self._epsilon_left(),
            )
            state = to_bytes(self.server_state) if self.server_state else b""
            commits.save(self.directory, digest, round_number, to_bytes(adapter), self.silos, run_id, key, state)
            self._meet()
        self._close()
        if self.certify:
            self._certify()

    def _certify(self) -> None:
        reserved = {
            name: silo for name, silo in self.silos.items() if silo.get("receipt", {}).get("epsilon_reserved", 0) > 0
        }
        document = certificate(self.exchange.run.id, self.plan, reserved)
        write_atomic(self.directory / "certificate.json", json.dumps(document, indent=2, sort_keys=True).encode())

    def _wait_for_silos(self, number: int) -> None:
        """Until so many have connected; at the deadline those that are there are enough, if enough for a round."""
        deadline = time.monotonic() + self.config.federated.round_timeout_s
        while (found := len(list(self.grid.get_node_ids()))) < number:
            if time.monotonic() > deadline:
                if found >= self.config.federated.min_silos:
                    return
                raise SiloweaveError(f"{found} of {number} silos have connected; start the others")
            time.sleep(1)

    def _meet(self) -> None:
        """Who is there now; one that is new reserves the whole schedule before it is asked for anything."""
        self._wait_for_silos(self.config.federated.min_silos)  # all may be away for a moment, after a restart
        for silo, described in self.exchange.meet():
            self.silos.setdefault(silo, {}).update(
                dataset_id=described.dataset_id,
                public_key=described.public_key,
                public_record_count=described.public_record_count,
            )
        text = json.dumps(self.plan.model_dump(), sort_keys=True)
        new = sorted(set(self.exchange.nodes) - self.reserved)
        bodies = Bodies(new, lambda silo: (self.exchange.body("reserve", silo, reserve=pb.Reserve(plan=text)), b""))
        already = len(set(self.exchange.nodes) & self.reserved)
        self.exchange.collect(bodies, QUERY, "reserve", self._take_reservation, already)

    def _take_reservation(self, silo: str, reply: pb.Reply) -> None:
        self._receipt(silo, reply.reserved.receipt)
        self.reserved.add(silo)

    def _round(self, round_number: int, adapter: Arrays) -> tuple[Arrays, list[str]]:
        aggregation = Aggregation(self.config.federated, adapter, self.server_state, len(self.silos))
        frozen = frozen_digest(adapter) if self.config.federated.adapters == "ffa" else ""

        def fold(silo: str, reply: pb.Reply) -> None:
            self._receipt(silo, reply.trained.receipt)  # an update without a sound receipt is not folded
            aggregation.add(silo, from_bytes(reply.trained.update))

        adapters: dict[int, bytes] = {}

        def body(silo: str) -> tuple[bytes, bytes]:
            sent = aggregation.sent(silo)
            if sent.rank not in adapters:
                adapters[sent.rank] = to_bytes(sent.adapter)
            train = self._train(round_number, sent, adapters[sent.rank], frozen)
            return self.exchange.body(f"round-{round_number}", silo, train=train), adapters[sent.rank]

        answered = self.exchange.collect(
            Bodies(self._present(), body), TRAIN, str(round_number), fold, enough=self.config.federated.enough_silos
        )
        adapter, self.server_state = aggregation.result()
        return adapter, answered

    def _train(self, round_number: int, sent: Sent, adapter: bytes, frozen: str) -> pb.Train:
        federated = self.config.federated
        seed = self.config.run.seed if frozen else 0
        return pb.Train(
            round=round_number,
            plan_digest=self.plan.digest,
            base_model_digest=self.base.content_digest,
            task=CausalTask.name,
            adapter_spec=pb.AdapterSpec(rank=sent.rank, alpha=sent.alpha, frozen_digest=frozen, frozen_seed=seed),
            adapter=adapter,
            learning_rate=federated.learning_rate,
            optimizer=federated.optimizer,
            proximal_mu=federated.proximal_mu,
            correction=to_bytes(sent.correction) if sent.correction else b"",
        )

    def _evaluate(self, round_number: int, adapter: Arrays | None) -> None:
        """Asks for the noised sums after a round that is to be evaluated; before its commit: a restart asks again."""
        number = _evaluation(round_number, self.plan.rounds, self.config.privacy.evaluations)
        if number is None or not self.certify:
            return
        evaluate = pb.Evaluate(
            number=number,
            metric=METRIC,
            plan_digest=self.plan.digest,
            base_model_digest=self.base.content_digest,
            task=CausalTask.name,
            adapter_spec=self._adapter_spec(),
            adapter=to_bytes(adapter) if adapter else b"",  # nothing: the base model alone
        )
        sums: dict[str, list[float]] = {}
        bounds = bounds_of(self.base, self.config.privacy.evaluation_labels)

        def take(silo: str, reply: pb.Reply) -> None:
            self._receipt(silo, reply.evaluated.receipt)
            sums[silo] = checked_sums(reply.evaluated.sums, bounds)

        bodies = self._bodies(f"evaluation-{number}", evaluate.adapter, evaluate=evaluate)
        answered = self.exchange.collect(bodies, TRAIN, f"evaluation-{number}", take)
        noise = self.config.privacy.evaluation_noise_multiplier
        found = figures([sums[silo] for silo in answered], bounds, noise)
        self.log.emit("federate", "private_evaluation", round=round_number, silos=answered, **found)

    def _adapter_spec(self) -> pb.AdapterSpec:
        return pb.AdapterSpec(rank=self.config.federated.lora_rank, alpha=self.config.federated.lora_alpha)

    def _bodies(self, request_id: str, shared: bytes = b"", **kind: Any) -> Bodies:
        """The same request to each silo that is there and has reserved."""
        return Bodies(self._present(), lambda silo: (self.exchange.body(request_id, silo, **kind), shared))

    def _present(self) -> list[str]:
        return sorted(set(self.exchange.nodes) & self.reserved)

    def _epsilon_left(self) -> float | None:
        """The least that a silo has left of its dataset's budget, by the receipts; None where there is none."""
        receipts = [silo["receipt"] for silo in self.silos.values() if "receipt" in silo]
        return min((receipt["epsilon_left"] for receipt in receipts), default=None)

    def _close(self) -> None:
        self.exchange.collect(self._bodies("close", close=pb.Close()), QUERY, "close", self._closed)

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
        if (signed.silo, signed.public_key, run) != (silo, known, self.exchange.run.id) or not signed.holds():
            raise ValueError("its receipt or statement is of another run, or not signed with the key that it gave")

    def _held(self, silo: str) -> bytes:
        receipt = self.silos.get(silo, {}).get("receipt", {})
        return canonical_json(receipt) if "signature" in receipt else b""


def _evaluation(round_number: int, rounds: int, evaluations: int) -> int | None:
    """Number of the private evaluation that follows a round; None where none does.

    A single one follows the last round; of several the first is of the base model, before round 1.
    """
    parts = max(evaluations - 1, 1)
    after = {rounds * (number + (evaluations == 1)) // parts: number + 1 for number in range(evaluations)}
    return after.get(round_number)
