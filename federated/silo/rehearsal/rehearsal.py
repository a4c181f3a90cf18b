"""Whether a run would work here: answered from settings, ledger and made-up records.

No record is read, nothing is charged or written to the ledger, and what is answered is a fixed set of facts that would
be the same with other records. The policy's rules apply to the request as they would in a run. Model and adapter are
put together, and steps taken, by a process of its own that has never held a record; the silo's warm model stays as it
is.
"""

import shutil
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from logging import Logger
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict

from configs.errors import PolicyRefusal
from configs.schema.silo import SiloConfig
from federated.protocol import silo_pb2 as pb
from federated.protocol.bounds import COLUMNS
from federated.protocol.framing import filler
from federated.silo.mandates.coverage import covering
from federated.silo.masking.terms import Known, check_roster
from federated.silo.policy import check_epsilon, check_model, check_new_plan, check_optimizer, plan_of
from federated.silo.rehearsal.trial import take
from federated.silo.requests import refusal_message, update_dtype_of
from federated.silo.reservations import budget_of, check_request_size, epsilon_of, limits_of
from privacy.ledger.journal import anchor_dir_of
from privacy.ledger.ledger import Ledger
from privacy.ledger.limits import DAY_S, check_new
from privacy.mandate import Mandate
from trainer.tasks.task import kind_of

MOST_A_DAY = 100  # requests of one coordinator; a rehearsal takes six, and of these one that computes
_KEPT = 4  # messages of the policy's size that the disk has to have room for: replies that are kept, and one that comes
RULE = "rehearsal"


class Rehearsals:
    """Answers rehearsals, one at a time, few a day, and none while the silo is at work.

    Args:
        ledger: the silo's. It is only looked at.
        base_model: digest of the silo's.
        log: the silo's own.
        known_now: gives the keys of the silos that the steward knows, by name.
        one_at_a_time: held while the silo answers another request.
        accounting: held while epsilon is computed.
    """

    def __init__(
        self,
        ledger: Ledger,
        base_model: str,
        log: Logger,
        known_now: Known,
        one_at_a_time: threading.Lock,
        accounting: threading.Lock,
    ) -> None:
        self._ledger, self._base_model, self._log, self._known_now = ledger, base_model, log, known_now
        self._one_at_a_time, self._accounting, self._under_way = one_at_a_time, accounting, threading.Lock()
        self._asked: dict[str, deque[float]] = defaultdict(deque)  # when, by coordinator

    def answer(self, config: SiloConfig, request: pb.Request, digest: str) -> pb.Rehearsed:
        """Says what a run would meet here.

        Args:
            config: the silo, with its policy of now.
            request: a rehearsal.
            digest: of its body.

        Raises:
            PolicyRefusal: the silo is at work, or was asked too often, or for more bytes than it was sent, or no
                mandate covers the run.
        """
        began, asked = time.monotonic(), request.rehearse
        if asked.filler_bytes > (most := request.ByteSize()):
            raise PolicyRefusal.of("filler_bytes", f"{asked.filler_bytes}", f"{most}, the request's own")
        with self._alone(request.coordinator):
            with self._one_at_a_time:
                mandate = covering(request, config, self._ledger.journal, self._log)
            told = _said(config, self._base_model)
            if asked.HasField("train"):
                told.refusals.extend(self._refusals(config, request, mandate))
                if asked.trial and told.room and not told.refusals:
                    self._try(told, config, asked)
        told.filler = filler(digest, asked.filler_bytes)
        told.clock, told.seconds = time.time(), time.monotonic() - began
        return told

    @contextmanager
    def _alone(self, coordinator: str) -> Iterator[None]:
        """Holds no other request up: whatever comes meanwhile is answered, and only another rehearsal is not."""
        if not self._under_way.acquire(blocking=False):
            raise PolicyRefusal.of(RULE, "a second one at a time", "one; ask again when it is over")
        try:
            self._count(coordinator)
            if not self._one_at_a_time.acquire(blocking=False):
                raise PolicyRefusal.of(RULE, "one while this silo is at work", "one while it rests; ask again later")
            self._one_at_a_time.release()
            yield
        finally:
            self._under_way.release()

    def _count(self, coordinator: str) -> None:
        now, asked = time.monotonic(), self._asked[coordinator]
        while asked and asked[0] <= now - DAY_S:
            asked.popleft()
        if len(asked) >= MOST_A_DAY:
            raise PolicyRefusal.of(RULE, f"{len(asked) + 1} requests within 24 hours", f"{MOST_A_DAY}")
        asked.append(now)

    def _refusals(self, config: SiloConfig, request: pb.Request, mandate: Mandate | None) -> list[str]:
        """What the run would be refused for, each rule that can be looked at by itself."""
        asked, policy = request.rehearse, config.policy
        checks: tuple[Callable[[], object], ...] = (
            lambda: check_request_size(asked.reserve, policy),
            lambda: self._check_plan(config, request, mandate),
            lambda: check_model(asked.train, policy, self._base_model),
            lambda: check_optimizer(asked.train, policy),
            lambda: update_dtype_of(asked.train),
        )
        return [said for check in checks if (said := _refused(check))]

    def _check_plan(self, config: SiloConfig, request: pb.Request, mandate: Mandate | None) -> None:
        policy = config.policy
        plan = check_new_plan(plan_of(request.rehearse.reserve.plan), policy, config.silo.public_record_count)
        check_roster(plan.terms, request.rehearse.reserve.secure.roster, self._known_now)
        epsilon = epsilon_of(plan.terms, self._accounting)
        check_epsilon(epsilon, policy)
        with self._one_at_a_time:
            self._ledger.accept(None)
            bodies = self._ledger.journal.bodies()
        # As the entry would have it that a reservation adds where the steward has changed the budget.
        bodies = [*bodies, {**bodies[-1], "kind": "policy", **asdict(budget_of(policy))}]
        check_new(bodies, plan.terms, epsilon, limits_of(policy, mandate), request.coordinator)

    def _try(self, told: pb.Rehearsed, config: SiloConfig, asked: pb.Rehearse) -> None:
        found = take(config, plan_of(asked.reserve.plan), asked.train, self._log)
        if isinstance(found, PolicyRefusal):
            told.refusals.append(_said_first(found))
        else:
            told.trial.CopyFrom(found)


def facts(reply: bytes) -> dict[str, Any]:
    """What the traffic log says of an answered rehearsal: all of it. Nothing of another reply."""
    told = pb.Reply.FromString(reply)
    if told.WhichOneof("kind") != "rehearsed":
        return {}
    told.rehearsed.ClearField("filler")
    return {"told": MessageToDict(told.rehearsed, preserving_proto_field_name=True)}


def _said(config: SiloConfig, base_model_digest: str) -> pb.Rehearsed:
    spec = config.policy.task_spec
    columns = [f"{field} = {config.data.column(field)}" for field in kind_of(spec.name).fields(spec)]
    return pb.Rehearsed(
        version=version("siloweave"),
        base_model_digest=base_model_digest,
        task=spec.name,
        task_spec=pb.TaskSpec(labels=spec.labels, template=spec.template, pooling=spec.pooling),
        columns=columns[:COLUMNS],
        room=_has_room(config),
    )


def _has_room(config: SiloConfig) -> bool:
    """By the steward's own numbers alone: what is asked for moves no bound, so nobody learns how much is free."""
    state_dir = Path(config.silo.state_dir)
    needed = _KEPT * config.policy.max_request_bytes
    places = (state_dir, anchor_dir_of(state_dir, config.silo.anchor_dir))
    return all(shutil.disk_usage(place).free >= needed for place in places if place.exists())


def _refused(check: Callable[[], object]) -> str:
    """A refusal as it leaves; nothing where there is none."""
    try:
        check()
    except PolicyRefusal as refusal:
        return _said_first(refusal)
    return ""


def _said_first(refusal: PolicyRefusal) -> str:
    """A refusal as it leaves, beginning with its rule."""
    said = refusal_message(refusal)
    return said.message if said.message.startswith(said.rule) else f"{said.rule}: {said.message}"
