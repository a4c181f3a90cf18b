"""Asks every silo whether a run would work there, each time for more.

``facts`` asks for nothing but what the silo says of itself, and so for the way there and back alone. ``request`` has
what a round's request has, ``reply`` has the silo send as much as a round's reply has, ``trial`` has it take steps on
made-up records. What they differ by is the line each way, and the work. What a round's messages take depends on when
relay and coordinator look for them: over a line that is quick enough for that, ``reply`` is asked for three times.
"""

import json
import math
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from configs.events import EventLog
from configs.schema.federated import FederatedSettings
from configs.schema.schema import RunConfig
from configs.storage.files import write_atomic
from configs.storage.layout import EVENTS
from configs.storage.manifests import require_manifest
from federated.adapters.arrays import Arrays, to_bytes
from federated.adapters.warm_model import held_back_in
from federated.aggregation.aggregation import RoundAggregation
from federated.aggregation.message_sizes import BESIDE_BYTES, message_sizes, require_room
from federated.aggregation.secure_sum import members
from federated.coordinator.exchange import SiloExchange
from federated.coordinator.final_model import start
from federated.coordinator.flower_grid import Nodes
from federated.coordinator.parties import Parties
from federated.coordinator.replies import Answer, Asked, one_line
from federated.coordinator.run_ticket import RunTicket
from federated.coordinator.schedule.mail import QUERY
from federated.coordinator.schedule.quorum import Quorum
from federated.coordinator.schedule.training_request import TrainingRequests
from federated.protocol import silo_pb2 as pb
from federated.protocol.framing import LARGEST_MESSAGE_BYTES, filler
from privacy.plan import PlanTerms
from privacy.plan_from_settings import plan_terms

FACTS, REQUEST, REPLY, TRIAL = "facts", "request", "reply", "trial"
AGAIN = ("reply-2", "reply-3")
_QUICK_S = 5.0  # a reply that takes longer is asked for once: its line's seconds are many times those of a look
HEARD = "rehearsal.json"
_LONGEST_QUERY_S, _LONGEST_TRANSFER_S, _LONGEST_TRIAL_S = 30.0, 600.0, 150.0
_LIFETIME_S = 24 * 3600
_OUTCOMES = ("", "done", "memory", "slow", "failed")


@dataclass
class Step:
    """One request to one silo.

    Attributes:
        seconds: from sending it to having its reply.
        in_silo: of these, those that the silo says it took.
        request_bytes: its envelope's.
        reply_bytes: the reply's envelope's.
    """

    seconds: float
    in_silo: float
    request_bytes: int
    reply_bytes: int


@dataclass
class Heard:
    """What was heard of one silo. Its words are a stranger's: short, and one line each.

    Attributes:
        public_record_count: as its steward declares it.
        version: of its software.
        base_model_digest: of its base model.
        task: as its steward declares it; so are labels, template and columns.
        room: whether its disks have room.
        ahead_s: seconds by which its clock is ahead of the coordinator's at least; below 0: behind.
        refusals: what it would refuse a run for.
        outcome: of the steps; records of each; seconds before them, for each, and once in a run.
        steps: those that were answered, by name.
        trouble: why the one after these was not; its rule where the silo refused.
    """

    public_record_count: int
    version: str = ""
    base_model_digest: str = ""
    task: str = ""
    labels: list[str] = field(default_factory=list)
    template: str = ""
    columns: list[str] = field(default_factory=list)
    room: bool = True
    ahead_s: float = 0.0
    refusals: list[str] = field(default_factory=list)
    outcome: str = ""
    records: int = 0
    prepare_s: float = 0.0
    step_s: float = 0.0
    first_s: float = 0.0
    steps: dict[str, Step] = field(default_factory=dict)
    trouble: str = ""
    rule: str = ""

    def goes_on(self, name: str) -> bool:
        """Whether it had no trouble so far, and is asked for this as well."""
        quick = name not in AGAIN or (REPLY in self.steps and self.steps[REPLY].seconds < _QUICK_S)
        return quick and not self.trouble and not self.refusals

    @classmethod
    def of(cls, tree: dict[str, Any]) -> "Heard":
        """From JSON."""
        return cls(**{**tree, "steps": {name: Step(**step) for name, step in tree["steps"].items()}})


class Rehearsal:
    """One rehearsal over a grid.

    Args:
        grid: reaches the silos' nodes.
        config: the run's settings.
        base_model: exported model directory.
        directory: receives events.
        parties: the coordinator's key, and the silos.
    """

    def __init__(self, grid: Nodes, config: RunConfig, base_model: Path, directory: Path, parties: Parties) -> None:
        self._config, self._base_model, self._directory = config, base_model, directory
        self.heard: dict[str, Heard] = {}
        self.nodes: dict[int, str] = {}  # why a node was not let in
        log = EventLog(directory / EVENTS, (self._noted,))
        ticket = RunTicket(f"rehearsal-{uuid.uuid4().hex}", int(time.time()) + _LIFETIME_S)
        settings = _soon(config.federated)
        secure = config.federated.secure_aggregation
        self._exchange = SiloExchange(grid, ticket, parties, settings, log, lambda _: b"", secure)

    def run(self) -> None:
        """All requests to each silo that is there.

        Raises:
            InputError: the base model is missing, or a round's messages are larger than what carries them.
        """
        plan = plan_terms(self._config)
        adapter = start(self._config, self._base_model, self._directory)
        sizes = message_sizes(self._config.federated, {name: array.shape for name, array in adapter.items()})
        require_room(sizes, LARGEST_MESSAGE_BYTES)
        self._exchange.meet(self._admitted, lambda: _LONGEST_QUERY_S)
        train = self._trains(plan, adapter)
        text = json.dumps(plan.model_dump(), sort_keys=True)
        reserve = pb.Reserve(plan=text, request_bytes=sizes.request, secure=self._secure())

        def asked(silo: str, **more: Any) -> tuple[pb.Rehearse, bytes]:
            content, shared = train(silo)
            return pb.Rehearse(reserve=reserve, train=content, **more), shared

        update = sizes.reply - BESIDE_BYTES
        self._ask(FACTS, lambda _: (pb.Rehearse(), b""), lambda: _LONGEST_QUERY_S)
        self._ask(REQUEST, asked, None)
        for name in (REPLY, *AGAIN):
            self._ask(name, lambda silo: asked(silo, filler_bytes=update), None, update)
        self._ask(TRIAL, lambda silo: asked(silo, trial=True), lambda: _LONGEST_TRIAL_S)

    def _secure(self) -> pb.Secure | None:
        """With whom the silos would add up."""
        return pb.Secure(roster=members(self._exchange.enrolled())) if self._exchange.secure else None

    def _admitted(self, silo: str, described: pb.Described) -> None:
        self.heard[silo] = Heard(described.public_record_count)

    def _trains(self, plan: PlanTerms, adapter: Arrays) -> Callable[[str], tuple[pb.Train, bytes]]:
        """Gives what a silo is asked in the first round, and the part of it that others are asked as well."""
        federated = self._config.federated
        base = require_manifest(self._base_model, "model", self._config.model.made_by)
        requests = TrainingRequests(self._config, plan, base.content_digest)
        held_back = held_back_in(self._config, self._base_model)(1)
        silos, frozen = max(len(self.heard), 1), requests.frozen_part(adapter)
        aggregation = RoundAggregation(federated.in_round(1), adapter, {}, silos, None, held_back)

        def of(silo: str) -> tuple[pb.Train, bytes]:
            sent = aggregation.sent(silo)
            content = to_bytes(sent.adapter)
            return requests.kind(1, sent, frozen, content)["train"], content

        return of

    def _ask(
        self,
        name: str,
        make: Callable[[str], tuple[pb.Rehearse, bytes]],
        patience_s: Callable[[], float] | None,
        filler_bytes: int = 0,
    ) -> None:
        """Asks those that had no trouble so far, and notes what they say and how long it took."""
        exchange, told = self._exchange, list[pb.Rehearsed]()
        fine = sorted(silo for silo, heard in self.heard.items() if heard.goes_on(name))
        silo_of = {exchange.nodes[silo]: silo for silo in fine if silo in exchange.nodes}
        asked: dict[int, Asked] = {}

        def sent() -> Iterator[tuple[int, bytes, bytes]]:
            for node, silo in silo_of.items():
                content, shared = make(silo)
                body = exchange.body(f"rehearsal-{name}", silo, rehearse=content)
                asked[node] = Asked.of(body)
                yield node, body, shared

        def take(answer: Answer) -> None:
            _check(answer, filler_bytes)
            told.append(answer.reply.rehearsed)

        began, sent_at, quorum = time.monotonic(), time.time(), Quorum(0)
        for node, message in exchange.mail.send(sent(), QUERY, name, patience_s):
            silo, seconds, moved = silo_of[node], time.monotonic() - began, exchange.mail.bytes_moved
            if exchange.take(silo, message, asked[node], (name, "rehearsed"), take, quorum):
                _note(self.heard[silo], told[-1], (sent_at, time.time()))
                size, replied = asked[node].size_bytes, exchange.mail.bytes_moved - moved
                self.heard[silo].steps[name] = Step(seconds, min(told[-1].seconds, seconds), size, replied)

    def _noted(self, event: dict[str, Any]) -> None:
        """Keeps why a silo, or a node that is no silo yet, has given no answer."""
        message, rule = one_line(event.get("message", "")), event.get("rule", "")
        if event["event"] == "timeout":
            for name in event["silos"]:
                if name in self.heard:
                    self.heard[name].trouble = message
                else:
                    self.nodes[int(name.removeprefix("node "))] = message
        elif "silo" in event:
            self.heard[event["silo"]].trouble, self.heard[event["silo"]].rule = message, rule
        elif "node" in event:
            self.nodes[int(event["node"])] = message


def rehearse(grid: Nodes, config: RunConfig, base_model: Path, directory: Path, parties: Parties) -> None:
    """Rehearses a run over a grid, and leaves what was heard in a file of ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    rehearsal = Rehearsal(grid, config, base_model, directory, parties)
    rehearsal.run()
    silos = {silo: asdict(heard) for silo, heard in rehearsal.heard.items()}
    write_atomic(directory / HEARD, json.dumps({"silos": silos, "nodes": rehearsal.nodes}).encode())


def _soon(settings: FederatedSettings) -> FederatedSettings:
    """The silos' own deadlines, and none that nobody sits and waits for."""
    most = _LONGEST_TRANSFER_S
    named = {name: min(seconds, most) for name, seconds in settings.deadlines_s.items()}
    return settings.model_copy(update={"round_timeout_s": min(settings.round_timeout_s, most), "deadlines_s": named})


def _check(answer: Answer, filler_bytes: int) -> None:
    """Raises a ValueError where a silo says what it can't, or sends other bytes than those that follow."""
    told = answer.reply.rehearsed
    of_trial = (told.trial.prepare_seconds, told.trial.step_seconds, told.trial.first_seconds)
    numbers = (told.clock, told.seconds, *of_trial)
    if not all(math.isfinite(number) and number >= 0 for number in numbers) or told.trial.outcome not in _OUTCOMES:
        raise ValueError("the reply has seconds, or an outcome, that nothing can have")
    if told.filler != filler(answer.reply.request_digest, filler_bytes):
        raise ValueError("the reply's filler is not the one that follows from the request")


def _note(heard: Heard, told: pb.Rehearsed, window: tuple[float, float]) -> None:
    earliest, latest = window
    heard.version, heard.base_model_digest, heard.task = map(
        one_line, (told.version, told.base_model_digest, told.task)
    )
    heard.labels, heard.columns, heard.refusals = (
        _lines(lines) for lines in (told.task_spec.labels, told.columns, told.refusals)
    )
    heard.template, heard.room = one_line(told.task_spec.template), told.room
    heard.ahead_s = told.clock - latest if told.clock > latest else min(told.clock - earliest, 0.0)
    heard.outcome, heard.records = told.trial.outcome, told.trial.records
    heard.prepare_s, heard.step_s = told.trial.prepare_seconds, told.trial.step_seconds
    heard.first_s = told.trial.first_seconds


def _lines(lines: Sequence[str]) -> list[str]:
    return [one_line(line) for line in lines]
