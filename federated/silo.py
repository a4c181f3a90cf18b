"""A silo: owns data, policy, ledger and a warm model. One entry point, ``handle(request bytes) -> reply bytes``.

The same object answers in process (local grid), behind gRPC (silo service), and so behind Flower. Order of a training
request: policy without reading data, charge, train, store the reply, only then send it.
"""

import hmac
import json
import logging
import math
import threading
from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from configs.artifacts import digest_bytes, require_manifest
from configs.encryption import load_key
from configs.errors import InputError, PolicyRefusal, SiloweaveError
from configs.load import parse
from configs.silo import SiloConfig
from federated import silo_pb2 as pb
from federated.adapters import Arrays, check_update, from_bytes, to_bytes
from federated.factors import frozen, frozen_digest
from federated.local_training import OPTIMIZERS, LocalSettings, private_update
from federated.protocol import PROTOCOL_VERSION
from federated.silo_data import Units, load_units
from privacy.certificate import library_versions
from privacy.chain import Budget
from privacy.ledger import Ledger
from privacy.plan import PlanRequest, PrivacyPlan
from privacy.signing import load_or_create_secret, load_secret
from privacy.statements import Receipt
from privacy.streams import SEED_BYTES, Streams
from trainer.data.tokenizer import load_tokenizer
from trainer.models import add_adapter, load_model, shapes, trainable
from trainer.tasks import CausalTask, Encoded

FAILED = "FAILED"
LARGEST_ECHO = 100  # characters of a request that a refusal repeats
LARGEST_PROXIMAL_MU = 100.0


class Silo:
    """One silo.

    Args:
        config: identity, data and policy.
        injected_seed: for tests of a simulated silo in this process only: makes its charges' seeds repeatable. A
            service never passes it.
    """

    def __init__(self, config: SiloConfig, injected_seed: bytes | None = None) -> None:
        self.config = config
        state_dir = Path(config.silo.state_dir)
        self.base_model = require_manifest(Path(config.silo.base_model), "model", "export")
        if self.base_model.metadata.get("trained_on") != "public":
            raise InputError(
                f"{config.silo.base_model}: its manifest does not say that it was trained on public text only; "
                "give a base model that `siloweave export` made"
            )
        budget = Budget(config.policy.budget_epsilon, config.policy.budget_delta)
        self.ledger = Ledger.open(
            state_dir,
            config.silo.id,
            config.silo.dataset_id,
            budget,
            _seed_source(injected_seed, config.silo.id),
            Path(config.silo.anchor_dir) if config.silo.anchor_dir else None,
        )
        self.units: Units = load_units(config, self._split_key(state_dir / "split.key"))
        self._log = _private_log(state_dir)
        self._one_at_a_time = threading.Lock()

    def _split_key(self, path: Path) -> bytes:
        """Drawn before anything is charged, and never again: a new one would train on what was held out."""
        charged = any(body["kind"] == "charge" for body in self.ledger.journal.bodies())
        return load_secret(path) if charged else load_or_create_secret(path)

    def close(self) -> None:
        """Closes the ledger's file."""
        self.ledger.close_file()

    def handle(self, body: bytes, receipt: bytes = b"") -> bytes:
        """Answers one request. Never raises: a refusal or a failure is a reply.

        Args:
            body: the request, whose digest binds a charge's seed.
            receipt: the last receipt of this silo that the coordinator holds, or nothing. It is no part of the digest:
                a restart sends the same body, and may hold another receipt.
        """
        digest = digest_bytes(body)
        try:
            request = decode(body, self.config.silo.id)
            with self._one_at_a_time:
                if request.WhichOneof("kind") != "describe":  # which tells public settings and asks no ledger
                    self.ledger.accept(_receipt(receipt))
                return self._dispatch(request, digest)
        except PolicyRefusal as refusal:
            shown = refusal_message(refusal)
            self._log.warning("refused %s: %s", digest, shown.message)
            return self._reply(digest, refusal=shown).SerializeToString(deterministic=True)
        except Exception:
            # Whatever failed may depend on the data: one constant code leaves, the details stay here.
            self._log.exception("failed %s", digest)
            return self._reply(digest, failure=pb.Failure(code=FAILED)).SerializeToString(deterministic=True)

    def _dispatch(self, request: pb.Request, digest: str) -> bytes:
        kind = request.WhichOneof("kind")
        if kind == "train":
            return self._train(request, digest)
        if kind == "reserve":
            reply = self._reply(digest, reserved=pb.Reserved(receipt=self._reserve(request)))
        elif kind == "close":
            reply = self._reply(digest, closed=self._close(request.run_id))
        else:
            reply = self._reply(digest, described=self.describe())
        return reply.SerializeToString(deterministic=True)

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

    def _reserve(self, request: pb.Request) -> bytes:
        plan = self._plan(request.reserve.plan)
        return self.ledger.reserve(request.run_id, plan, self.config.policy.max_epsilon_per_day).to_bytes()

    def _close(self, run_id: str) -> pb.Closed:
        receipt = self.ledger.close(run_id)
        attests = self.config.policy.attests_disjoint_units
        statement = self.ledger.statement(run_id, library_versions(), attests_disjoint_units=attests)
        return pb.Closed(receipt=receipt.to_bytes(), statement=statement.to_bytes() if statement else b"")

    def _plan(self, text: str) -> PrivacyPlan:
        """The plan, bound to this silo's own size and checked against its policy."""
        if len(text) > 10_000:
            raise _refuse("plan", f"{len(text)} characters", "at most 10000 characters")
        try:
            request = parse(PlanRequest, _json_object(text), "plan")
        except InputError as error:
            raise _refuse("plan", "an inconsistent plan", str(error)) from None
        plan = request.bind(self.config.silo.public_record_count)
        policy = self.config.policy
        if request.noise_multiplier < policy.min_noise_multiplier:
            raise _refuse("min_noise_multiplier", f"{request.noise_multiplier:g}", f"{policy.min_noise_multiplier:g}")
        if request.sampling_rate > policy.max_sampling_rate:
            raise _refuse("max_sampling_rate", f"{request.sampling_rate:g}", f"{policy.max_sampling_rate:g}")
        if request.steps_per_round > policy.max_steps_per_round:
            raise _refuse("max_steps_per_round", f"{request.steps_per_round}", f"{policy.max_steps_per_round}")
        weakest = min((metric.noise_multiplier for metric in request.metric_releases), default=math.inf)
        if weakest < policy.min_noise_multiplier:
            raise _refuse("min_noise_multiplier", f"{weakest:g} for a metric", f"{policy.min_noise_multiplier:g}")
        epsilon = request.epsilon
        if epsilon > policy.max_epsilon_per_run:
            raise _refuse("max_epsilon_per_run", f"{epsilon:.4g}", f"{policy.max_epsilon_per_run:g}")
        if request.metric_releases:
            raise _refuse("metric_releases", f"{len(request.metric_releases)}", "none: no silo releases metrics yet")
        return plan

    def _train(self, request: pb.Request, digest: str) -> bytes:
        train = request.train
        # 1. Policy: from the request and the settings alone, without reading data.
        plan = self._reserved_plan(request.run_id, train.plan_digest)
        self._check_training(train)
        model, adapter = self.model(train), _arrays(train.adapter)
        if shapes(trainable(model)) != shapes(adapter):
            raise _refuse("adapter", "other names or shapes", "those of the adapter that adapter_spec describes")
        settings = self.local_settings(train)
        # 2. Charge. A request that was answered before gets the stored reply.
        charge = self.ledger.charge(request.run_id, request.request_id, digest, train.round)
        if charge.reply is not None:
            return charge.reply
        if charge.seed is None:
            raise SiloweaveError(f"charge {charge.number} has neither seed nor reply")
        # 3. Train under the charge's own randomness.
        streams = Streams(charge.seed, digest)
        update = private_update(plan, streams, model, self.task, adapter, self.records, settings)
        # 4. Store the reply, erase the seed; only then may a byte of it leave.
        receipt = self.ledger.receipt(request.run_id).to_bytes()
        trained = pb.Trained(receipt=receipt, update=to_bytes(update))
        reply = self._reply(digest, trained=trained).SerializeToString(deterministic=True)
        return self.ledger.release(charge.number, request.run_id, reply)

    def _reserved_plan(self, run_id: str, plan_digest: str) -> PrivacyPlan:
        reservation = self.ledger.reservation(run_id)
        if reservation is None or reservation["plan_digest"] != plan_digest:
            raise _refuse("reservation", plan_digest or "no plan", "the plan that the run reserved")
        request = parse(PlanRequest, reservation["plan"], "ledger")
        return PrivacyPlan(request=request, public_record_count=reservation["public_record_count"])

    def _check_training(self, train: pb.Train) -> None:
        policy = self.config.policy
        if train.base_model_digest != self.base_model.content_digest:
            raise _refuse("base_model", train.base_model_digest, self.base_model.content_digest)
        if train.task != CausalTask.name:
            raise _refuse("task", train.task, CausalTask.name)
        if not 1 <= train.adapter_spec.rank <= policy.max_lora_rank:
            raise _refuse("max_lora_rank", str(train.adapter_spec.rank), f"1 to {policy.max_lora_rank}")
        if not 0 < train.learning_rate <= 1:
            raise _refuse("learning_rate", f"{train.learning_rate:g}", "above 0, at most 1")
        if not 0 <= train.proximal_mu <= LARGEST_PROXIMAL_MU:
            raise _refuse("proximal_mu", f"{train.proximal_mu:g}", f"0 to {LARGEST_PROXIMAL_MU:g}")
        if train.optimizer not in OPTIMIZERS:
            raise _refuse("optimizer", train.optimizer or "none", ", ".join(OPTIMIZERS))

    def model(self, train: pb.Train) -> Any:
        """The warm base model with the adapter that a request describes."""
        silo, spec = self.config.silo, train.adapter_spec
        seed = spec.frozen_seed if spec.frozen_digest else None
        model = warm_model(Path(silo.base_model), spec.rank, spec.alpha, silo.encryption_key_file, seed)
        if spec.frozen_digest:  # another version of a library may draw another A, and then B would mean nothing
            drawn = frozen_digest({name: value.detach().numpy() for name, value in model.named_parameters()})
            if drawn != spec.frozen_digest:
                raise _refuse("frozen_digest", spec.frozen_digest, drawn)
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

    def local_settings(self, train: pb.Train) -> LocalSettings:
        """What the request says of the steps, and the silo of their speed."""
        silo = self.config.silo
        correction = _arrays(train.correction, "correction") if train.correction else {}
        if correction:
            try:
                check_update(correction, _arrays(train.adapter))
            except ValueError as error:
                raise _refuse("correction", str(error), "finite values in the adapter's shapes") from None
        return LocalSettings(
            train.learning_rate, train.optimizer, silo.micro_batch_size, silo.clipping, train.proximal_mu, correction
        )


@lru_cache(maxsize=1)
def warm_model(directory: Path, rank: int, alpha: float, key_file: str = "", frozen_seed: int | None = None) -> Any:
    """The base model with an adapter, once a process, shared by the silos that it hosts (one trains at a time).

    With a seed, A is drawn from it and doesn't train.
    """
    model = add_adapter(load_model(directory, load_key(key_file)), rank, alpha, frozen_seed or 0)
    for name, value in trainable(model).items():
        value.requires_grad = frozen_seed is None or not frozen(name)
    return model


def decode(body: bytes, silo_id: str) -> pb.Request:
    """Parses a request and checks that it is for this silo, in a version that it speaks.

    Raises:
        PolicyRefusal: it is not.
    """
    request = pb.Request()
    try:
        request.ParseFromString(body)
    except Exception as error:  # protobuf's DecodeError lives in an untyped module
        raise _refuse("request", type(error).__name__, "a serialized Request") from None
    kind = request.WhichOneof("kind")
    if request.version != PROTOCOL_VERSION:
        raise _refuse("version", str(request.version), str(PROTOCOL_VERSION))
    if kind is None:
        raise _refuse("request", "no kind", "describe, reserve, train or close")
    if kind != "describe" and request.silo_id != silo_id:
        raise _refuse("silo_id", request.silo_id, silo_id)
    if kind != "describe" and not (request.run_id and len(request.run_id) <= 100 and len(request.request_id) <= 200):
        raise _refuse("run_id", request.run_id or "empty", "1 to 100 characters, request_id up to 200")
    return request


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise _refuse("plan", "not JSON", "a JSON object") from None
    if not isinstance(value, dict):
        raise _refuse("plan", type(value).__name__, "a JSON object")
    return value


def _arrays(content: bytes, field: str = "adapter") -> Arrays:
    try:
        return from_bytes(content)
    except ValueError as error:
        raise _refuse(field, str(error), "float32 safetensors") from None


def _refuse(rule: str, asked: str, allowed: str) -> PolicyRefusal:
    asked = asked[:LARGEST_ECHO]
    return PolicyRefusal(f"{rule}: asked {asked}, allowed {allowed}", rule=rule, asked=asked, allowed=allowed)


def refusal_message(refusal: PolicyRefusal) -> pb.Refusal:
    """A refusal as it leaves and is logged: one line, whatever was asked."""
    asked, allowed, message = map(_one_line, (refusal.asked[:LARGEST_ECHO], refusal.allowed, str(refusal)))
    return pb.Refusal(rule=refusal.rule, asked=asked, allowed=allowed, message=message)


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:2000])


def _receipt(content: bytes) -> Receipt | None:
    try:
        return Receipt.from_bytes(content, "receipt") if content else None
    except InputError:
        raise _refuse("receipt", "something else", "a receipt of this silo, as it was sent") from None


def _seed_source(injected: bytes | None, silo_id: str) -> Callable[[str], bytes] | None:
    """None draws from the operating system; an injected seed derives one for each request's digest."""
    if injected is None:
        return None
    return lambda digest: hmac.digest(injected, f"{silo_id}/{digest}".encode(), "sha256")[:SEED_BYTES]


def _private_log(state_dir: Path) -> logging.Logger:
    """The silo's own log, in its state directory; nothing of it is sent."""
    logger = logging.getLogger(f"siloweave.silo.{state_dir}")
    if not logger.handlers:
        path = state_dir / "silo.log"
        path.touch(mode=0o600)
        handler = logging.FileHandler(path)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger
