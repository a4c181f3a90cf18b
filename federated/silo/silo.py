"""A silo: owns data, policy, ledger and a warm model. One entry point, ``handle(envelope bytes) -> envelope bytes``.

The same object answers in process (local grid), behind gRPC (silo service), and so behind Flower. Order of a training
request: who asks, policy and proof without reading data, charge, train, store the reply, only then send it.
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.errors import PolicyRefusal
from configs.schema.silo import SiloConfig
from configs.storage.files import digest_bytes
from configs.storage.layout import SiloFiles
from federated.adapters.arrays import Arrays
from federated.aggregation.secure_sum import length_of, members, written
from federated.evaluation.label_counts import examples_of
from federated.evaluation.private_sums import bounds_of, evaluated, private_sums
from federated.identity.trust import trusted_coordinators
from federated.protocol import silo_pb2 as pb
from federated.protocol.envelope import seal_reply
from federated.protocol.framing import PROTOCOL_VERSION
from federated.silo.contribution import Contribution
from federated.silo.line_file import close_log, private_log
from federated.silo.local_training import proved
from federated.silo.mandates.coverage import covering
from federated.silo.masking.masking import Masking, OpenSum
from federated.silo.masking.terms import agreed, check_roster, confirmed_now, shared_noise
from federated.silo.policy import check_model, check_optimizer
from federated.silo.rehearsal.rehearsal import Rehearsals, facts
from federated.silo.released.released import Released, asks_for_update
from federated.silo.remainders.remainders import Remainders
from federated.silo.requests import (
    check_sender,
    decode,
    open_envelope,
    receipt_of,
    refusal_message,
    travels_in,
)
from federated.silo.reservations import (
    account,
    budget_of,
    close,
    entrusted_plan,
    plan_of_sum,
    policy_now,
    reserve,
    reserved_plan,
)
from federated.silo.traffic_log import TrafficLog, UnloggedError
from federated.silo.units import load_units, split_key
from federated.silo.workbench import Workbench, public_base_model
from privacy.ledger.ledger import Charge, Ledger
from privacy.mechanism.streams import injected_seeds
from privacy.plan import METRIC

FAILED = "FAILED"


class Silo:
    """One silo.

    Args:
        config: identity, data and policy.
        trusted: public keys of the coordinators that may ask a simulated silo; None reads the steward's files in the
            state directory, again for every request.
        injected_seed: for tests of a simulated silo in this process only: makes its charges' seeds repeatable. A
            service never passes it.
        file: the silo.toml, whose policy is read again for every request; None keeps that of ``config``.
        roster: public keys of a simulation's silos by name; None reads what the steward has confirmed, as ``trusted``.

    Raises:
        InputError: the base model, the ledger, the data or a trusted coordinator's file can't be used.
    """

    def __init__(
        self,
        config: SiloConfig,
        trusted: frozenset[str] | None = None,
        injected_seed: bytes | None = None,
        file: Path | None = None,
        roster: Mapping[str, str] | None = None,
    ) -> None:
        self.config, self._trusted, self._file, self._roster = config, trusted, file, roster
        self._state_dir = Path(config.silo.state_dir)
        base_model = public_base_model(config)
        self.trusted()
        self.ledger = Ledger.open(
            self._state_dir,
            config.silo.id,
            config.silo.dataset_id,
            budget_of(config.policy),
            injected_seeds(injected_seed, config.silo.id),
            Path(config.silo.anchor_dir) if config.silo.anchor_dir else None,
        )
        key = split_key(SiloFiles(self._state_dir), self.ledger.journal.bodies())
        units = load_units(config, key)
        self._log, self._traffic = private_log(self._state_dir), TrafficLog(self._state_dir)
        self._released = Released(self._state_dir)
        self.workbench = Workbench(config, base_model, units, self._log)
        self._one_at_a_time, self._accounting = threading.Lock(), threading.Lock()
        locks = self._one_at_a_time, self._accounting
        self._rehearsals = Rehearsals(self.ledger, base_model.content_digest, self._log, self.roster, *locks)
        self._masking = Masking(config.silo.id, self.ledger.journal.signer)
        self._remainders = Remainders(self._state_dir, self._log)
        self._remainders.drop_old(self.ledger.journal, strays=True)

    def trusted(self) -> frozenset[str]:
        """Public keys of the coordinators that may ask now."""
        return trusted_coordinators(self._state_dir) if self._trusted is None else self._trusted

    def roster(self) -> Mapping[str, str]:
        """Public keys of the silos that may add up with this one now, by name; its own among them.

        Raises:
            PolicyRefusal: a file of the roster can't be read; which one is told to the silo's own log alone.
        """
        if self._roster is not None:
            return self._roster
        return confirmed_now(self._state_dir, self._log) | {self.config.silo.id: self.ledger.public_key}

    def close(self) -> None:
        """Closes the files of ledger and log. A host of many silos keeps few open."""
        self.ledger.close_file()
        close_log(self._log)

    def handle(self, content: bytes) -> bytes:
        """Answers one request. A refusal or a failure is a reply, too.

        Args:
            content: an envelope: the body, whose digest binds a charge's seed; the last receipt of this silo that the
                coordinator holds, which is no part of the digest (a restart sends the same body, and may hold another
                receipt); and the coordinator's signature over both.

        Raises:
            UnloggedError: the traffic log can't be written, and so nothing may leave. A stored reply waits.
        """
        try:
            return self._exchanged(content)
        except UnloggedError:
            self._log.exception("no reply to %s", digest_bytes(content))
            raise

    def _exchanged(self, content: bytes) -> bytes:
        digest, accepted, told = "", False, dict[str, Any]()
        try:
            if self._file is not None:
                self.config = self.config.model_copy(update={"policy": policy_now(self._file, self._log)})
            envelope = open_envelope(content, self.config.policy.max_request_bytes)
            digest = digest_bytes(envelope.body)
            request = decode(envelope.body, self.config.silo.id)
            check_sender(envelope, request, self.trusted())
            self._count(request, content, digest)
            accepted = True
            body, outcome = self._answer(request, envelope.receipt, digest), "answered"
            if self.config.silo.keep_released and asks_for_update(request):
                self._released.keep(digest, envelope.body, body, self.workbench.members_digest)
            told = facts(body) if request.HasField("rehearse") else {}
        except UnloggedError:
            raise
        except PolicyRefusal as refusal:
            shown = refusal_message(refusal)
            if accepted:  # else whoever reaches the silo could push out what this log says of others
                self._log.warning("refused %s: %s", digest, shown.message)
            body, outcome = _serialized(self._reply(digest, refusal=shown)), f"refused: {shown.rule}"
        except Exception:
            # Whatever failed may depend on the data: one constant code leaves, the details stay here.
            self._log.exception("failed %s", digest)
            body, outcome = _serialized(self._reply(digest, failure=pb.Failure(code=FAILED))), "failed"
        reply = seal_reply(self.ledger.journal.signer, body)
        public = {"request_digest": digest, "outcome": outcome, **told}
        if accepted:
            self._traffic.leaves(reply, **public)
        else:
            self._traffic.turned_away(content, reply, **public)
        return reply

    def _answer(self, request: pb.Request, receipt: bytes, digest: str) -> bytes:
        kind, config = request.WhichOneof("kind"), self.config
        if kind == "rehearse":
            rehearsed = self._rehearsals.answer(config, request, digest)
            return _serialized(self._reply(digest, rehearsed=rehearsed))
        with self._one_at_a_time:
            mandate = covering(request, config, self.ledger.journal, self._log)
            if kind != "describe":  # which tells public settings and asks no ledger
                self.ledger.accept(receipt_of(receipt))
        if kind == "reserve":
            locks = self._one_at_a_time, self._accounting
            account(self.ledger, config, request, mandate, self.roster, *locks)
        with self._one_at_a_time:
            return self._dispatch(request, digest)

    def _count(self, request: pb.Request, content: bytes, digest: str) -> None:
        names = {"run": request.run_id, "request": request.request_id, "kind": request.WhichOneof("kind")}
        names |= {"study": request.study} if request.study else {}
        most = self.config.policy.max_requests_per_day
        self._traffic.accepted(content, request.coordinator, most, request_digest=digest, **names)

    def _dispatch(self, request: pb.Request, digest: str) -> bytes:
        kind = request.WhichOneof("kind")
        mandate = covering(request, self.config, self.ledger.journal, self._log)  # anew: it may be revoked by now
        if kind == "train":
            return self._train(request, digest)
        if kind == "evaluate":
            return self._evaluate(request, digest)
        if kind == "aggregate":
            return self._aggregate(request, digest)
        if kind == "contribute":
            reply = self._reply(digest, trained=self._contribute(request, digest))
        elif kind == "reserve":
            reply = self._reply(digest, reserved=reserve(self.ledger, self.config, request, mandate))
        elif kind == "close":
            reply = self._reply(digest, closed=close(self.ledger, self.config, request))
            self._masking.forget(request)
            self._remainders.drop_old(self.ledger.journal)
        else:
            reply = self._reply(digest, described=self.describe())
        return _serialized(reply)

    def _reply(self, digest: str, **kind: Any) -> pb.Reply:
        return pb.Reply(version=PROTOCOL_VERSION, silo_id=self.config.silo.id, request_digest=digest, **kind)

    def describe(self) -> pb.Described:
        """Who this silo is: public facts only."""
        silo = self.config.silo
        return pb.Described(
            dataset_id=silo.dataset_id,
            public_key=self.ledger.public_key,
            public_record_count=silo.public_record_count,
        )

    def _receipt(self, request: pb.Request) -> bytes:
        return self.ledger.receipt(request.run_id, request.coordinator).to_bytes()

    def _train(self, request: pb.Request, digest: str) -> bytes:
        train = request.train
        # 1. Policy and proof: from the request, the settings and made-up units alone, without reading data. A request
        # that was answered before gets the stored reply, whatever a proof would say now.
        plan = reserved_plan(self.ledger, self.config, request, train.plan_digest)
        check_model(train, self.config.policy, self.workbench.base_model.content_digest)
        check_optimizer(train, self.config.policy)
        how = travels_in(train, plan.terms.compression)
        model, adapter = self.workbench.fitted(train, self.config.policy)
        settings, examples = self.workbench.local_settings(train, self.config.policy), self.workbench.examples(train)
        summed = agreed(request, plan.terms, self.roster, length_of(adapter))
        noise = shared_noise(plan.terms, summed, length_of(adapter))
        release = self._release(request, digest, train.round)
        stored = self.ledger.reply(*release)
        if stored is not None:
            return stored
        ready = proved(plan, model, examples.task, adapter, settings, self._log)
        # 2. Charge.
        charge = self.ledger.charge(*release)
        if charge.reply is not None:  # by another process, meanwhile
            return charge.reply
        # 3. Train under the charge's own randomness.
        opened, left, streams, records = None, Arrays(), charge.streams(digest), examples.records
        if summed is None:
            update = ready.run(streams, records)
            content, left = self._remainders.written(update, how, request, self.ledger.journal)
            leaves = {"update": content}
        else:
            part = ready.run(streams, records) if noise is None else ready.share(streams, records, noise)
            opened = self._masking.begun(summed, part, train.plan_digest, release)
            leaves = {"keys": opened.keys}
        # 4. Store the reply, erase the seed; only then may a byte of it leave.
        reply = _serialized(self._reply(digest, trained=pb.Trained(receipt=self._receipt(request), **leaves)))
        if left:
            self._remainders.keep(reply, left, self.ledger.journal)
        stored = self._released_as(reply, charge, request, opened)
        if left:
            self._remainders.drop_old(self.ledger.journal)
        return stored

    def _contribute(self, request: pb.Request, digest: str) -> pb.Trained:
        """An update without noise of the silo's own, or its keys, where it leaves under masks alone."""
        asked, journal = request.contribute.train, self.ledger.journal
        plan = entrusted_plan(self.ledger, self.config, request, asked.plan_digest)
        how = travels_in(asked, plan.compression)
        given = Contribution(self.workbench, self.config, plan, request, digest)
        summed = agreed(request, plan, self.roster, length_of(given.adapter))
        if summed is None:
            content, _ = self._remainders.written(given.update(journal), how, request, journal)
            return pb.Trained(receipt=self._receipt(request), update=content)
        if (opened := self._masking.same(request, digest)) is None:
            told, words = self._release(request, digest, asked.round), given.words(journal, summed.encoding)
            self._masking.keep(request, opened := self._masking.begun(summed, words, asked.plan_digest, told))
        return pb.Trained(receipt=self._receipt(request), keys=opened.keys)

    def _aggregate(self, request: pb.Request, digest: str) -> bytes:
        """This silo's next message of a sum that it is in, as policy, roster and ledger are now."""
        opened = self._masking.of(request)
        terms = plan_of_sum(self.ledger, self.config, request, opened.plan_digest, opened.release)
        check_roster(terms, members(opened.agreement.roster), self.roster)
        message = opened.answer(request.aggregate, digest)
        return _serialized(self._reply(digest, aggregated=pb.Aggregated(message=message)))

    def _evaluate(self, request: pb.Request, digest: str) -> bytes:
        """Answers like ``_train``, in the same order; what is read are the held-out units."""
        asked = request.evaluate
        plan = reserved_plan(self.ledger, self.config, request, asked.plan_digest)
        release = next((metric for metric in plan.terms.metric_releases if metric.name == asked.metric), None)
        if release is None or asked.metric != METRIC:
            raise PolicyRefusal.of("metric", asked.metric or "none", METRIC)
        check_model(asked, self.config.policy, self.workbench.base_model.content_digest)
        bench = self.workbench
        model, adapter = bench.fitted(asked, self.config.policy) if asked.adapter else (bench.model(asked), None)
        spec, multiplier = self.config.policy.task_spec, release.noise_multiplier
        bounds = bounds_of(bench.base_model, spec, release.labels, release.max_new_tokens)
        summed = agreed(request, plan.terms, self.roster, bounds.num_sums)
        charged = self._release(request, digest, asked.number, asked.metric)
        charge = self.ledger.charge(*charged)
        if charge.reply is not None:
            return charge.reply
        streams = charge.streams(digest)
        with evaluated(model, adapter):
            examples = examples_of(bench.task, bench.held_out_texts, release.labels) if release.labels else []
            sums = private_sums(model, bench.task, bench.held_out, examples, bounds, multiplier, streams)
        opened, leaves = None, pb.Evaluated(receipt=self._receipt(request))
        if summed is None:
            leaves.sums.extend(sums)
        else:
            opened = self._masking.begun(summed, written(sums, summed.encoding), asked.plan_digest, charged)
            leaves.keys = opened.keys
        reply = _serialized(self._reply(digest, evaluated=leaves))
        return self._released_as(reply, charge, request, opened)

    def _released_as(self, reply: bytes, charge: Charge, request: pb.Request, opened: OpenSum | None) -> bytes:
        """The reply that is stored, and so may leave; a sum is kept if it is this one whose keys are in it."""
        stored = self.ledger.release(charge.number, request.run_id, reply)
        if opened and stored == reply:  # else another process has answered meanwhile, and its keys are the round's
            self._masking.keep(request, opened)
        return stored

    @staticmethod
    def _release(
        request: pb.Request, digest: str, number: int, metric: str = ""
    ) -> tuple[str, str, str, int, str, str]:
        """What the ledger is asked to charge."""
        return request.run_id, request.request_id, digest, number, metric, request.coordinator


def _serialized(reply: pb.Reply) -> bytes:
    return reply.SerializeToString(deterministic=True)
