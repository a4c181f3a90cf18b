"""The coordinator's rounds: reserve, train, fold, commit, close. The same code over the local grid and over Flower."""

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from configs.events import EventLog, Listener
from configs.run_directory import config_digest
from configs.schema.schema import RunConfig
from configs.schema.stages import numbered
from configs.storage.files import digest_bytes, write_atomic
from configs.storage.layout import CERTIFICATE, EVENTS
from configs.storage.manifests import Manifest, require_manifest
from configs.storage.sealing import MasterKey, load_key
from federated.adapters.arrays import Arrays, from_bytes, to_bytes
from federated.adapters.warm_model import held_back_in
from federated.aggregation.aggregation import RoundAggregation, check_size
from federated.aggregation.message_sizes import MessageSizes, message_sizes, require_room
from federated.aggregation.secure_sum import length_of
from federated.coordinator import round_commits as commits
from federated.coordinator.exchange import Bodies, SiloExchange
from federated.coordinator.flower_grid import Nodes
from federated.coordinator.parties import Parties
from federated.coordinator.replies import Answer
from federated.coordinator.run_ticket import open_run
from federated.coordinator.schedule.arrivals import Arrivals
from federated.coordinator.schedule.buffered import BufferedRounds, Models
from federated.coordinator.schedule.evaluations import PrivateEvaluations
from federated.coordinator.schedule.mail import QUERY, TRAIN
from federated.coordinator.schedule.quorum import Quorum
from federated.coordinator.schedule.training_request import TrainingRequests
from federated.coordinator.secure.masked_clients import MaskedClients
from federated.coordinator.secure.masked_sum import SUM_TAKES
from federated.coordinator.secure.secure_rounds import SecureRounds, check_silos
from federated.coordinator.secure.shared_step import check_values
from federated.coordinator.secure.sum_record import SumRecord
from federated.coordinator.silo_records import SiloRecords
from federated.coordinator.trusted_aggregator import TrustedAggregator, new_aggregator
from federated.protocol import silo_pb2 as pb
from federated.protocol.bounds import WHOLE
from privacy.certificate.certificate import AGGREGATOR, certificate
from privacy.certificate.model_digests import ModelDigests, RoundDigests
from privacy.declaration import declared_by
from privacy.plan import PlanTerms
from privacy.plan_from_settings import plan_terms

LONGEST_QUERY_S = 60.0


@dataclass
class Coordinator:
    """One run of a federation.

    Attributes:
        grid: reaches the silos' nodes.
        config: the run's settings.
        base_model: exported model directory.
        directory: receives the rounds' commits, the certificate and the final adapter.
        parties: the coordinator's key, and the silos.
        log: receives one event per round, refusal or rejected reply.
        certify: write a certificate; False for the comparison without DP.
        carries_bytes: what a request or a reply may have on the way to the silos.
        sizes: what its own have; nothing until the adapter is there.
        aggregator: adds the noise, with clients as units; None with records.
    """

    grid: Nodes
    config: RunConfig
    base_model: Path
    directory: Path
    parties: Parties
    log: EventLog
    certify: bool = True
    carries_bytes: int = WHOLE
    sizes: MessageSizes = field(init=False, default=MessageSizes(0, 0))
    exchange: SiloExchange = field(init=False)
    plan: PlanTerms = field(init=False)
    base: Manifest = field(init=False)
    requests: TrainingRequests = field(init=False)
    silo_records: SiloRecords = field(init=False)
    aggregator: TrustedAggregator | None = field(init=False)
    reserved: set[str] = field(default_factory=set)
    released: dict[str, str] = field(default_factory=dict)
    digests: tuple[RoundDigests, ...] = ()
    server_state: Arrays = field(default_factory=dict)
    held_back: Callable[[int], frozenset[str]] = field(init=False)
    buffered: BufferedRounds | None = None
    secure: SecureRounds | None = None

    def __post_init__(self) -> None:
        federated = self.config.federated
        check_size(federated, self.parties.num_silos)
        check_silos(self.config, self.parties.size)
        run = open_run(self.directory, federated.run_lifetime_h)
        self.plan = plan_terms(self.config, compressed=self.certify)
        self.silo_records = SiloRecords(run.id, self.plan, signed=self.certify)
        secure, held = federated.secure_aggregation and self.certify, self.silo_records.held
        self.exchange = SiloExchange(self.grid, run, self.parties, federated, self.log, held, secure)
        self.base = require_manifest(self.base_model, "model", self.config.model.made_by)
        self.requests = TrainingRequests(self.config, self.plan, self.base.content_digest)
        self.aggregator = new_aggregator(self.parties, run.id, self.plan)
        self.held_back = held_back_in(self.config, self.base_model)
        if secure:
            told = self.requests, federated, self.plan, SumRecord(self.directory)
            self.secure = SecureRounds(self.exchange, *told, self._present, self.silo_records)

    def run(self, initial_adapter: Callable[[], Arrays]) -> None:
        """All rounds, from the one after the newest commit.

        Raises:
            InputError: a round's messages are larger than what carries them.
            PolicyRefusal: fewer than ``federated.min_silos`` silos are left because policies refuse.
            SiloweaveError: fewer are left for another reason.
        """
        digest, key = config_digest(self.config), load_key(self.config.run.encryption_key_file)
        run_id = self.exchange.run.id
        say = partial(self.log.emit, "federate", "damaged")
        commit = commits.newest(self.directory, digest, lambda line: say(message=line), key)
        adapter = from_bytes(commit.adapter) if commit else initial_adapter()
        self.sizes = message_sizes(self.config.federated, {name: array.shape for name, array in adapter.items()})
        require_room(self.sizes, self.carries_bytes)  # before a commit binds the folder to these settings
        check_values(self.plan, length_of(adapter))
        if commit is None:
            commit = commits.save(self.directory, digest, commits.Round(0, to_bytes(adapter), {}), run_id, key)
        self.digests = commits.digests(self.directory, commit, key)
        self.silo_records.restore(commit.silos, f"{self.directory}: round {commit.round_number}")
        place, stated = commits.closing(self.directory, digest, run_id, lambda line: say(message=line))
        self.silo_records.restore(stated, str(place))
        if self.config.federated.schedule == "buffered":
            self.buffered = self._buffered(commit, key)
        self._meet(self.parties.num_silos, commit.round_number)
        self.server_state = from_bytes(commit.server_state) if commit.server_state else {}
        if commit.round_number == 0:
            self._evaluate(0, None if self.config.federated.starts_as_base else adapter)
        for round_number in range(commit.round_number + 1, self.plan.rounds + 1):
            began, self.exchange.mail.bytes_moved = time.perf_counter(), 0
            adapter, answered = self._round(round_number, adapter)
            self._evaluate(round_number, adapter)
            in_stage = numbered([stage.rounds for stage in self.config.federated.stages], round_number - 1)
            took = {"bytes": self.exchange.mail.bytes_moved, "seconds": time.perf_counter() - began}
            said = {"round": round_number, "rounds": self.plan.rounds, **in_stage, "answered": answered, **took}
            said["epsilon_left"] = self.silo_records.epsilon_left()
            said |= self.buffered.said() if self.buffered else {}
            self.log.emit("federate", "round", **said)
            state = to_bytes(self.server_state) if self.server_state else b""
            silos, content = self.silo_records.silos, to_bytes(adapter)
            done = commits.Round(round_number, content, silos, state, self.released, self.digests)
            if self.buffered:
                done = replace(done, updates=tuple(self.buffered.updates), tasks=self.buffered.arrivals.tasks)
            commits.save(self.directory, digest, done, run_id, key)
            self.digests = (*self.digests, done.digests)
            self._meet(self.config.federated.min_silos, round_number)  # all may be away for a moment, after a restart
        self._close()

    def _buffered(self, commit: commits.Round, key: MasterKey | None) -> BufferedRounds:
        arrivals = Arrivals(self.directory, self.exchange.run.id, key)
        arrivals.go_on_from(self.digests, commit.tasks)
        models = Models(self.directory, self.requests, self.exchange.body, key)
        take_receipt, settings = self.silo_records.take_receipt, self.config.federated
        return BufferedRounds(self.exchange, arrivals, settings, models, self._present, take_receipt, self._update)

    def certify_model(self, files: dict[str, str]) -> dict[str, Any]:
        """Writes the certificate of a run whose rounds are done, and returns it.

        Args:
            files: digests of what is published.

        Raises:
            SiloweaveError: the model has an update of a silo that has not signed what it spent.
        """
        base, declared = self.base.content_digest, declared_by(self.base_model, self.base)
        said = {"declared_public_by": declared, "continues": commits.earlier_certificate(self.directory)}
        model = ModelDigests(base_model=base, rounds=self.digests, adapter=files, **said)
        if self.aggregator is not None:  # its ledger, and no silo's, stands for the guarantee
            reserved, mandated = {AGGREGATOR: self.aggregator.close()}, self.silo_records.mandated()
        else:
            reserved, mandated = self.silo_records.for_certificate(model.contributors()), {}
        document = certificate(self.exchange.run.id, self.plan, reserved, model, mandated=mandated)
        write_atomic(self.directory / CERTIFICATE, json.dumps(document, indent=2, sort_keys=True).encode())
        return document

    def _meet(self, number: int, done: int) -> None:
        """Looks who is there now; a new silo reserves the whole schedule before it is asked for anything.

        Args:
            number: silos to wait for.
            done: rounds that are committed. After the last one nobody has to be there: a silo that stays away then
                gives no statement, and ends nothing.

        Raises:
            InputError: there are rounds to do, and the run's time is up.
        """
        fewest = self.config.federated.min_silos if done < self.plan.rounds else 0
        needs = Quorum(fewest)
        if self.secure and fewest:
            needs = Quorum(fewest := self.secure.fewest(), rule=SUM_TAKES)
        if done < self.plan.rounds:
            self.exchange.run.require_time(self.directory, self.silo_records.cost_anew)
        self.exchange.wait_for(number, fewest)
        meet = partial(self.exchange.meet, self.silo_records.describe, self._patience_s)
        meet()
        if done < self.plan.rounds:
            self.exchange.wait_for_required(meet)
        text = json.dumps(self.plan.model_dump(), sort_keys=True)
        new = sorted(set(self.exchange.nodes) - self.reserved)
        secure = self.secure.reservation() if self.secure else None
        asked = pb.Reserve(plan=text, request_bytes=self.sizes.request, secure=secure)
        bodies = Bodies(new, lambda silo: (self.exchange.body("reserve", silo, reserve=asked), b""), self._patience_s)
        present = self._present()
        needs.already = len(present)
        if done < self.plan.rounds:
            needs.missing = lambda answered: self.config.federated.missing([*present, *answered])
        self.exchange.collect(bodies, QUERY, "reserve", "reserved", self._take_reservation, needs)

    def _update(self, content: bytes, like: Arrays) -> Arrays:
        return self.requests.update(content, like, self.sizes.request)

    def _patience_s(self) -> float:
        """How long to wait for what needs no training: not for long where there are silos enough for a round.

        With a longer wait a silo that never answers would hold up every round. One that is late is asked again after
        the round.
        """
        federated = self.config.federated
        enough = len(self._present()) >= max(federated.min_silos, federated.enough_silos)
        return min(federated.round_timeout_s, LONGEST_QUERY_S) if enough else federated.round_timeout_s

    def _take_reservation(self, answer: Answer) -> None:
        study, key = self.config.federated.study, self.parties.signer.public_key
        self.silo_records.take_reservation(answer.silo, answer.reply.reserved, study, key)
        self.reserved.add(answer.silo)

    def _round(self, round_number: int, adapter: Arrays) -> tuple[Arrays, list[str]]:
        federated = self.config.federated.in_round(round_number)
        clients = self.aggregator.plan if self.aggregator else None
        silos, held_back = len(self.silo_records.silos), self.held_back(round_number)
        aggregation = RoundAggregation(federated, adapter, self.server_state, silos, clients, held_back)
        self.released = {}
        if self.aggregator is not None:
            return self._client_round(self.aggregator, round_number, aggregation, adapter)
        if self.secure:
            summed = self.secure.round(round_number, aggregation, adapter)
            if summed is None:
                return adapter, []
            self.released, (adapter, self.server_state) = summed.releases, aggregation.after(summed.mean)
            return adapter, summed.answered
        ask = self.buffered.ask if self.buffered else partial(self._ask, adapter=adapter)
        if answered := ask(round_number, aggregation):
            adapter, self.server_state = aggregation.result()
        return adapter, answered

    def _client_round(
        self, aggregator: TrustedAggregator, number: int, aggregation: RoundAggregation, adapter: Arrays
    ) -> tuple[Arrays, list[str]]:
        inputs = {"plan": self.plan.digest, "base_model": self.base.content_digest}
        inputs |= {"settings": config_digest(self.config), "adapter": digest_bytes(to_bytes(adapter))}
        if self.secure is None:
            ask = partial(self._ask, number, aggregation, adapter)
            released = aggregator.round(number, inputs, ask, aggregation.clipped_sum.noised_mean)
        elif (opened := self.secure.opened(number, aggregation, adapter)) is None:
            return adapter, []
        else:
            masked = MaskedClients(opened, aggregator.plan)
            released = aggregator.round(number, inputs, masked.ask, masked.noised_mean)
        adapter, self.server_state = aggregation.after(released.mean)
        self.released = {AGGREGATOR: digest_bytes(to_bytes(released.mean))}  # of what has noise; no client's update
        return adapter, released.answered

    def _ask(self, round_number: int, aggregation: RoundAggregation, adapter: Arrays) -> list[str]:
        """Sends the adapter to the silos that are there, and folds their updates. Returns those who answered."""
        frozen, federated = self.requests.frozen_part(adapter), self.config.federated

        def fold(answer: Answer) -> None:
            trained = answer.reply.trained
            self.silo_records.take_receipt(answer.silo, trained.receipt)  # without a sound one an update is not folded
            aggregation.add(answer.silo, self._update(trained.update, aggregation.travels(answer.silo)))
            self.released[answer.silo] = answer.digest

        adapters: dict[int, bytes] = {}

        def body(silo: str) -> tuple[bytes, bytes]:
            sent = aggregation.sent(silo)
            if sent.rank not in adapters:
                adapters[sent.rank] = to_bytes(sent.adapter)
            kind = self.requests.kind(round_number, sent, frozen, adapters[sent.rank])
            return self.exchange.body(f"round-{round_number}", silo, **kind), adapters[sent.rank]

        # With clients as units at most the plan's number are asked, chosen by name: the choice must not depend on data.
        silos, told = self._present()[: self.config.privacy.num_clients or None], federated.missing
        needs = Quorum(federated.min_silos, enough=federated.enough_silos, grace_s=federated.grace_s, missing=told)
        return self.exchange.collect(Bodies(silos, body), TRAIN, str(round_number), "trained", fold, needs)

    def _evaluate(self, round_number: int, adapter: Arrays | None) -> None:
        if self.certify:
            told = self.config, self.base, self.silo_records.take_receipt, self.secure
            evaluations = PrivateEvaluations(self.exchange, self.requests, *told)
            evaluations.after(round_number, adapter, self._bodies)

    def _bodies(self, request_id: str, shared: bytes = b"", **kind: Any) -> Bodies:
        """The same request to each silo that is there and has reserved."""
        return Bodies(self._present(), lambda silo: (self.exchange.body(request_id, silo, **kind), shared))

    def _present(self) -> list[str]:
        return sorted(set(self.exchange.nodes) & self.reserved)

    def _close(self) -> None:
        """Asks for the closing statements. The certificate says who has given none; the run ends all the same.

        What was stated is committed at once: the same command again, with silos away, must not know less.
        """
        released = sum((one.counts for one in self.digests), Counter[str]())
        if self.buffered:
            self.buffered.stop()

        def take(answer: Answer) -> None:
            closed, silo = answer.reply.closed, answer.silo
            self.silo_records.take_receipt(silo, closed.receipt)
            self.silo_records.take_statement(silo, closed.statement, released[silo])

        bodies = self._bodies("close", close=pb.Close())
        if self.exchange.collect(bodies, QUERY, "close", "closed", take, Quorum(0)) and self.certify:
            digest, run_id = config_digest(self.config), self.exchange.run.id
            commits.save_closing(self.directory, digest, self.silo_records.silos, run_id)


def run_federation(
    grid: Nodes,
    config: RunConfig,
    base_model: Path,
    directory: Path,
    parties: Parties,
    on_event: Listener,
    *,
    certify: bool = True,
    carries_bytes: int = WHOLE,
) -> None:
    """Runs a federation over a grid to its end, from its newest commit, and publishes what it has made."""
    from federated.coordinator.final_model import save_final, start, write_card

    directory.mkdir(parents=True, exist_ok=True)
    log = EventLog(directory / EVENTS, (on_event,))
    coordinator = Coordinator(grid, config, base_model, directory, parties, log, certify, carries_bytes)
    coordinator.run(lambda: start(config, base_model, directory))
    files = save_final(config, base_model, directory)
    write_card(config, directory, coordinator.certify_model(files) if certify else None)
