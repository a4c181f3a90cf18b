"""A silo: owns data, policy, ledger and a warm model. One entry point, ``handle(envelope bytes) -> envelope bytes``.

The same object answers in process (local grid), behind gRPC (silo service), and so behind Flower. Order of a training
request: who asks, policy without reading data, charge, train, store the reply, only then send it.
"""

import logging
import threading
from functools import cached_property
from pathlib import Path
from typing import Any

from configs.errors import InputError, PolicyRefusal, SiloweaveError
from configs.schema.silo import SiloConfig
from configs.storage.files import digest_bytes
from configs.storage.layout import SiloFiles
from configs.storage.manifests import require_manifest
from configs.storage.secrets import load_or_create_secret, load_secret
from federated.adapters.arrays import Arrays, to_bytes
from federated.adapters.lora_factors import frozen_digest
from federated.adapters.warm_model import warm_model
from federated.evaluation.label_counts import examples_of
from federated.evaluation.private_sums import bounds_of, evaluated, private_sums
from federated.identity.trust import trusted_coordinators
from federated.protocol import silo_pb2 as pb
from federated.protocol.envelope import seal_reply
from federated.protocol.framing import PROTOCOL_VERSION
from federated.silo.contribution import contribution
from federated.silo.line_file import PrivateLog
from federated.silo.local_training import LocalSettings, private_update
from federated.silo.policy import check_model, check_optimizer
from federated.silo.requests import (
    arrays,
    check_sender,
    correction_of,
    decode,
    open_envelope,
    receipt_of,
    refusal_message,
)
from federated.silo.reservations import account, budget_of, close, policy_now, reserve, reserved_plan
from federated.silo.traffic_log import AuditLog, UnloggedError
from federated.silo.units import Units, load_units
from privacy.ledger.client_runs import UNNOISED
from privacy.ledger.ledger import Charge, Ledger
from privacy.mechanism.streams import Streams, injected_seeds
from privacy.plan import METRIC
from trainer.data.tokenizer import load_tokenizer
from trainer.models.adapters import shapes, trainable
from trainer.tasks.task import Encoded
from trainer.tasks.text import CausalTask

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

    Raises:
        InputError: the base model, the ledger, the data or a trusted coordinator's file can't be used.
    """

    def __init__(
        self,
        config: SiloConfig,
        trusted: frozenset[str] | None = None,
        injected_seed: bytes | None = None,
        file: Path | None = None,
    ) -> None:
        self.config, self._trusted, self._file = config, trusted, file
        self._state_dir = Path(config.silo.state_dir)
        self.base_model = require_manifest(Path(config.silo.base_model), "model", "export")
        if self.base_model.metadata.get("trained_on") != "public":
            raise InputError(
                f"{config.silo.base_model}: its manifest does not say that it was trained on public text only; "
                "give a base model that `siloweave export` made"
            )
        self.trusted()
        self.ledger = Ledger.open(
            self._state_dir,
            config.silo.id,
            config.silo.dataset_id,
            budget_of(config.policy),
            injected_seeds(injected_seed, config.silo.id),
            Path(config.silo.anchor_dir) if config.silo.anchor_dir else None,
        )
        self.units: Units = load_units(config, self._split_key(SiloFiles(self._state_dir).split_key))
        self._log, self._audit = _private_log(self._state_dir), AuditLog(self._state_dir)
        self.one_at_a_time, self.accounting = threading.Lock(), threading.Lock()

    def trusted(self) -> frozenset[str]:
        """Public keys of the coordinators that may ask now."""
        return trusted_coordinators(self._state_dir) if self._trusted is None else self._trusted

    def _split_key(self, path: Path) -> bytes:
        """Drawn before anything is charged, and never again: a new one would train on what was held out."""
        charged = any(body["kind"] in ("charge", UNNOISED) for body in self.ledger.journal.bodies())
        return load_secret(path) if charged else load_or_create_secret(path)

    def close(self) -> None:
        """Closes the files of ledger and log. A host of many silos keeps few open."""
        self.ledger.close_file()
        for handler in list(self._log.handlers):
            self._log.removeHandler(handler)
            handler.close()

    def handle(self, content: bytes) -> bytes:
        """Answers one request. A refusal or a failure is a reply, too.

        Args:
            content: an envelope: the body, whose digest binds a charge's seed; the last receipt of this silo that the
                coordinator holds, which is no part of the digest (a restart sends the same body, and may hold another
                receipt); and the coordinator's signature over both.

        Raises:
            UnloggedError: the audit log can't be written, and so nothing may leave. A stored reply waits.
        """
        digest = ""
        try:
            self._audit.came_in(content)
            try:
                if self._file is not None:
                    self.config = self.config.model_copy(update={"policy": policy_now(self._file, self._log)})
                envelope = open_envelope(content, self.config.policy.max_request_bytes)
                digest = digest_bytes(envelope.body)
                body, outcome = self._answer(envelope, digest), "answered"
            except PolicyRefusal as refusal:
                shown = refusal_message(refusal)
                self._log.warning("refused %s: %s", digest, shown.message)
                body, outcome = _serialized(self._reply(digest, refusal=shown)), f"refused: {shown.rule}"
            return self._sealed(body, digest, outcome)
        except UnloggedError:
            self._log.exception("no reply to %s", digest)
            raise
        except Exception:
            # Whatever failed may depend on the data: one constant code leaves, the details stay here.
            self._log.exception("failed %s", digest)
            failure = _serialized(self._reply(digest, failure=pb.Failure(code=FAILED)))
            return self._sealed(failure, digest, "failed")

    def _answer(self, envelope: pb.Envelope, digest: str) -> bytes:
        request = decode(envelope.body, self.config.silo.id)
        check_sender(envelope, request, self.trusted())
        self._count(request, digest)
        kind = request.WhichOneof("kind")
        if kind != "describe":  # which tells public settings and asks no ledger
            with self.one_at_a_time:
                self.ledger.accept(receipt_of(envelope.receipt))
        if kind == "reserve":
            account(self, request)
        with self.one_at_a_time:
            return self._dispatch(request, digest)

    def _count(self, request: pb.Request, digest: str) -> None:
        names = {"run": request.run_id, "request": request.request_id, "kind": request.WhichOneof("kind")}
        number = self._audit.accepted(request.coordinator, request_digest=digest, **names)
        if number > self.config.policy.max_requests_per_day:
            raise PolicyRefusal.of("max_requests_per_day", f"{number}", f"{self.config.policy.max_requests_per_day}")

    def _sealed(self, body: bytes, digest: str, outcome: str) -> bytes:
        reply = seal_reply(self.ledger.journal.signer, body)
        self._audit.leaves(reply, request_digest=digest, outcome=outcome)
        return reply

    def _dispatch(self, request: pb.Request, digest: str) -> bytes:
        kind = request.WhichOneof("kind")
        if kind == "train":
            return self._train(request, digest)
        if kind == "evaluate":
            return self._evaluate(request, digest)
        if kind == "contribute":
            update = to_bytes(contribution(self, request, digest))
            reply = self._reply(digest, trained=pb.Trained(receipt=self._receipt(request), update=update))
        elif kind == "reserve":
            reply = self._reply(digest, reserved=reserve(self, request))
        elif kind == "close":
            reply = self._reply(digest, closed=close(self, request))
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
        # 1. Policy: from the request and the settings alone, without reading data.
        plan = reserved_plan(self, request, train.plan_digest)
        check_model(train, self.config.policy, self.base_model.content_digest)
        check_optimizer(train, self.config.policy)
        model, adapter = self.fitted(train)
        settings = self.local_settings(train)
        # 2. Charge. A request that was answered before gets the stored reply.
        charge = self._charge(request, digest, train.round)
        if charge.reply is not None:
            return charge.reply
        # 3. Train under the charge's own randomness.
        streams = _streams(charge, digest)
        update = private_update(plan, streams, model, self.task, adapter, self.records, settings)
        # 4. Store the reply, erase the seed; only then may a byte of it leave.
        trained = pb.Trained(receipt=self._receipt(request), update=to_bytes(update))
        reply = _serialized(self._reply(digest, trained=trained))
        return self.ledger.release(charge.number, request.run_id, reply)

    def _evaluate(self, request: pb.Request, digest: str) -> bytes:
        """As a round of training, in the same order; what is read are the held-out units."""
        asked = request.evaluate
        plan = reserved_plan(self, request, asked.plan_digest)
        release = next((metric for metric in plan.request.metric_releases if metric.name == asked.metric), None)
        if release is None or asked.metric != METRIC:
            raise PolicyRefusal.of("metric", asked.metric or "none", METRIC)
        check_model(asked, self.config.policy, self.base_model.content_digest)
        model, adapter = self.fitted(asked) if asked.adapter else (self.model(asked), None)
        charge = self._charge(request, digest, asked.number, asked.metric)
        if charge.reply is not None:
            return charge.reply
        streams = _streams(charge, digest)
        with evaluated(model, adapter):
            bounds, multiplier = bounds_of(self.base_model, release.labels), release.noise_multiplier
            examples = examples_of(self.task, self.units.held_out, release.labels) if release.labels else []
            sums = private_sums(model, self.task, self.held_out, examples, bounds, multiplier, streams)
        reply = _serialized(self._reply(digest, evaluated=pb.Evaluated(receipt=self._receipt(request), sums=sums)))
        return self.ledger.release(charge.number, request.run_id, reply)

    def fitted(self, asked: pb.Train | pb.Evaluate) -> tuple[Any, Arrays]:
        """The warm model and the request's adapter, which fits it."""
        model, adapter = self.model(asked), arrays(asked.adapter, self.config.policy.max_adapter_value)
        if shapes(trainable(model)) != shapes(adapter):
            raise PolicyRefusal.of(
                "adapter", "other names or shapes", "those of the adapter that adapter_spec describes"
            )
        return model, adapter

    def _charge(self, request: pb.Request, digest: str, number: int, metric: str = "") -> Charge:
        run, coordinator = request.run_id, request.coordinator
        return self.ledger.charge(run, request.request_id, digest, number, metric, coordinator)

    def model(self, asked: pb.Train | pb.Evaluate) -> Any:
        """The warm base model with the adapter that a request describes."""
        silo, spec = self.config.silo, asked.adapter_spec
        seed = spec.frozen_seed if spec.frozen_digest else None
        ours = silo.clipping == "bookkeeping"
        model = warm_model(Path(silo.base_model), spec.rank, spec.alpha, silo.encryption_key_file, seed, onednn=ours)
        if spec.frozen_digest:  # another version of a library may draw another A, and then B would mean nothing
            drawn = frozen_digest({name: value.detach().numpy() for name, value in model.named_parameters()})
            if drawn != spec.frozen_digest:
                raise PolicyRefusal.of("frozen_digest", spec.frozen_digest, drawn)
        return model

    @cached_property
    def task(self) -> CausalTask:
        """What a record is to the model."""
        tokenizer = load_tokenizer(Path(self.config.silo.base_model))
        return CausalTask(tokenizer, self.base_model.metadata["context_length"])

    @cached_property
    def records(self) -> list[Encoded]:
        """The training units as tokens. Private; what was mended on the way is counted in the silo's own log."""
        records = [self.task.encode(unit) for unit in self.units.train]
        truncated, counts = sum(record.truncated for record in records), self.units.counts
        self._log.info("%d of %d training units were truncated to the context", truncated, len(records))
        self._log.info(
            "source: %d texts with invalid UTF-8 replaced, %d empty, %d left out without silo or unit",
            counts.replaced_utf8,
            counts.empty,
            counts.without_unit,
        )
        if self.units.deidentified is not None:
            self._log.info("spans de-identified, by kind: %s", self.units.deidentified)
        return records

    @cached_property
    def held_out(self) -> list[Encoded]:
        """The held-out units as tokens. Private."""
        return [self.task.encode(unit) for unit in self.units.held_out]

    def local_settings(self, train: pb.Train) -> LocalSettings:
        """What the request says of the steps, and the silo of their speed."""
        silo = self.config.silo
        return LocalSettings(
            train.learning_rate,
            train.optimizer,
            silo.micro_batch_size,
            silo.clipping,
            train.proximal_mu,
            correction_of(train, self.config.policy.max_adapter_value),
        )


def _streams(charge: Charge, digest: str) -> Streams:
    """The randomness of a charge that was not answered yet."""
    if charge.seed is None:
        raise SiloweaveError(f"charge {charge.number} has neither seed nor reply")
    return Streams(charge.seed, digest)


def _serialized(reply: pb.Reply) -> bytes:
    return reply.SerializeToString(deterministic=True)


def _private_log(state_dir: Path) -> logging.Logger:
    """The silo's own log, in its state directory; nothing of it is sent."""
    logger = logging.getLogger(f"siloweave.silo.{state_dir}")
    if not logger.handlers:
        logger.addHandler(PrivateLog(SiloFiles(state_dir).log))
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger
