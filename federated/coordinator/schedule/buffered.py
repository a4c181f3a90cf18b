"""Buffered asynchronous rounds (FedBuff, Nguyen et al. 2022) over what silos release.

A silo that has answered gets the newest model at once. Whenever ``buffer`` updates have come the server takes a step
with them, each times a public weight that falls with the steps that were taken since its model. Requests and charges of
a silo are those of synchronous rounds: its first, second, ... round, each from one model. Which updates make a step, in
which order and with which weights, follows from what was released and from when it came; so epsilon is the same.

A step is one ``ask``: what the record has of it comes first, and then silos are asked until it is full.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from configs.errors import InputError, SiloweaveError
from configs.schema.federated import FederatedSettings
from configs.storage.sealing import MasterKey
from federated.adapters.arrays import Arrays, from_bytes, to_bytes
from federated.aggregation.aggregation import RoundAggregation
from federated.coordinator import round_commits as commits
from federated.coordinator.exchange import Bodies, SiloExchange
from federated.coordinator.replies import Answer
from federated.coordinator.round_commits import Task
from federated.coordinator.schedule.arrivals import Arrivals
from federated.coordinator.schedule.mail import TRAIN, Posted
from federated.coordinator.schedule.quorum import Quorum
from federated.coordinator.schedule.training_request import TrainingRequests
from federated.protocol import silo_pb2 as pb
from privacy.certificate.model_digests import UpdateDigest

_MODELS_KEPT = 2  # in memory; another one is read from its commit
_Model = tuple[RoundAggregation, dict[str, Any], bytes]  # gives what silos are sent; FFA's frozen part; the adapter


@dataclass
class Models:
    """Requests to train from the shared model as it was after any step, made of that step's commit.

    Attributes:
        directory: the federation's.
        requests: what they say.
        body: makes a request's bytes.
        key: of what is encrypted.
    """

    directory: Path
    requests: TrainingRequests
    body: Callable[..., bytes]
    key: MasterKey | None

    def __post_init__(self) -> None:
        self._of: Callable[[int], _Model] = lru_cache(_MODELS_KEPT)(self._read)

    def request(self, silo: str, task: Task) -> tuple[bytes, bytes]:
        """A silo's request, and the part of it that others have in common with it.

        Raises:
            InputError: the model's commit is missing or damaged.
        """
        aggregation, frozen, adapter = self._of(task.version)
        kind = self.requests.kind(task.round, aggregation.sent(silo), frozen, adapter)
        return self.body(f"round-{task.round}", silo, **kind), adapter

    def _read(self, version: int) -> _Model:
        commit = commits.whole(self.directory, version, self.key)
        shared, state = from_bytes(commit.adapter), from_bytes(commit.server_state) if commit.server_state else {}
        aggregation = RoundAggregation(self.requests.config.federated, shared, state, 0)
        return aggregation, self.requests.frozen_part(shared), to_bytes(aggregation.sent("").adapter)


@dataclass
class BufferedRounds:
    """One run's server steps.

    Attributes:
        exchange: asks silos.
        arrivals: what was asked and has come.
        settings: size of the buffer, weights, deadlines.
        models: makes requests.
        present: gives the silos that are there.
        take_receipt: keeps a silo's receipt.
        read: gives the update that a silo's bytes are, of arrays like those that it was asked to train.
        updates: what the step at hand is made of.
    """

    exchange: SiloExchange
    arrivals: Arrivals
    settings: FederatedSettings
    models: Models
    present: Callable[[], list[str]]
    take_receipt: Callable[[str, bytes], None]
    read: Callable[[bytes, Arrays], Arrays]
    updates: list[UpdateDigest] = field(default_factory=list)
    _step: int = 0
    _resting: set[str] = field(default_factory=set)
    _quorum: Quorum = field(init=False)
    _aggregation: RoundAggregation = field(init=False)

    def ask(self, step: int, aggregation: RoundAggregation) -> list[str]:
        """Has a step's updates folded in; silos stay at work on more.

        Returns:
            The silos whose updates they are; nobody, where every silo has given all its rounds and too few are left.

        Raises:
            PolicyRefusal: too few silos are left, and a policy refused.
            SiloweaveError: too few are left; or an update that the record has can't be had again.
        """
        self._step, self._aggregation, self.updates = step, aggregation, []
        self._quorum = Quorum(self.settings.min_silos)
        self._resting.clear()
        self.arrivals.forget_before(step - 1)
        for position, update in self.arrivals.of_step(step):
            self._fold_again(position, update)
        while not self._full() and not self.arrivals.was_taken(step):
            self._keep_busy()
            if not self.exchange.mail.in_flight:
                break
            self._take_in()
        return self._folded()

    def stop(self) -> None:
        """Waits for no reply any more, and says whose are still to come."""
        late = sorted(posted.silo for posted in self.exchange.mail.in_flight.values())
        self.exchange.mail.in_flight.clear()
        if late:
            self._say(
                "unused", f"{', '.join(late)} at work when the last step was taken: that is charged, and in no step"
            )

    def said(self) -> dict[str, Any]:
        """What a round's event says of the step."""
        stalest = max((self._step - 1 - update.version for update in self.updates), default=0)
        return {"updates": dict(Counter(update.silo for update in self.updates)), "stalest": stalest}

    def _full(self) -> bool:
        return len(self.updates) >= self.settings.buffer and self._has_enough_silos()

    def _has_enough_silos(self) -> bool:
        return len({update.silo for update in self.updates}) >= self.settings.min_silos

    def _keep_busy(self) -> None:
        """Asks who is there and has nothing to do; who was at work when the coordinator ended is asked again."""
        at_work = self._at_work()
        waits = self._waits(at_work)
        for silo in self.present():
            if silo in at_work or silo in self._resting or silo in waits:
                continue
            task = self.arrivals.tasks.get(silo, Task(0, 0, open=False))
            if not task.open and task.round < self.settings.rounds:
                task = self.arrivals.asked(silo, task.round + 1, self._step - 1)
            if task.open:
                self._post(silo, task)

    def _waits(self, at_work: set[str]) -> set[str]:
        """Those that the step has, while its other places are for other silos: they would spend rounds for nothing."""
        there = {update.silo for update in self.updates}
        lacks, free = self.settings.min_silos - len(there), self.settings.buffer - len(self.updates)
        return there if lacks > 0 and lacks >= free - len(there & at_work) else set()

    def _at_work(self) -> set[str]:
        """Who has a request. One that went to a node which its silo has left is given up, and sent to its new one."""
        flying, nodes = self.exchange.mail.in_flight, self.exchange.nodes
        for name in [name for name, posted in flying.items() if nodes.get(posted.silo, posted.node) != posted.node]:
            del flying[name]
        return {posted.silo for posted in flying.values()}

    def _post(self, silo: str, task: Task) -> None:
        try:
            body, shared = self.models.request(silo, task)
        except InputError as error:
            self._give_up(silo)
            self._say("rejected", f"silo {silo}: its round {task.round} can't be asked for again: {error}", silo=silo)
            return
        self.exchange.mail.post(self.exchange.nodes[silo], body, shared, str(self._step))

    def _take_in(self) -> None:
        for posted in self.exchange.mail.overdue(str(self._step)):
            self._give_up(posted.silo)
        for posted, message in self.exchange.mail.landed():
            self._take(posted, message)
            if self._full():
                break

    def _take(self, posted: Posted, message: Any) -> None:
        silo, task = posted.silo, self.arrivals.tasks[posted.silo]
        staleness = self._step - 1 - task.version
        weight, sound = float((1 + staleness) ** -self.settings.staleness_exponent), list[Answer]()

        def accept(answer: Answer) -> None:
            self.exchange.require_enrolled(silo)
            self.take_receipt(silo, answer.reply.trained.receipt)
            if staleness > self.settings.max_staleness:
                most = self.settings.max_staleness
                raise ValueError(
                    f"its update is from the model of {staleness} steps ago, federated.max_staleness is {most}; it "
                    "stays charged"
                )
            self._fold(silo, answer.reply.trained, weight)
            sound.append(answer)

        step = str(self._step), "trained"
        if not self.exchange.take(silo, message, posted.asked, step, accept, self._quorum):
            self._give_up(silo)
            return
        update = UpdateDigest(silo=silo, round=task.round, version=task.version, weight=weight, digest=sound[0].digest)
        self.arrivals.arrived(self._step, update, sound[0].body)
        self.updates.append(update)

    def _fold(self, silo: str, trained: pb.Trained, weight: float) -> None:
        update = self.read(trained.update, self._aggregation.travels(silo))
        self._aggregation.add(silo, update, weight)

    def _fold_again(self, position: int, update: UpdateDigest) -> None:
        """Folds an update that the record has: as it was kept, or as its silo has kept it."""
        found = self.arrivals.reply(position, update)
        trained = pb.Reply.FromString(found or self._asked_again(update)).trained
        self.take_receipt(update.silo, trained.receipt)
        self._fold(update.silo, trained, update.weight)
        self._quorum.answered.append(update.silo)
        self.updates.append(update)

    def _asked_again(self, update: UpdateDigest) -> bytes:
        if update.silo not in self.present():
            raise SiloweaveError(
                f"step {self._step}: the update of {update.silo} in it has to be asked for again, and the silo is not "
                "there; run the same command again when it is"
            )
        found: list[bytes] = []

        def keep(answer: Answer) -> None:
            if answer.digest != update.digest:
                raise ValueError("the reply is another one than it gave before")
            found.append(answer.body)

        bodies = Bodies([update.silo], lambda silo: self.models.request(silo, Task(update.round, update.version)))
        self.exchange.collect(bodies, TRAIN, str(self._step), "trained", keep, Quorum(1))
        return found[0]

    def _give_up(self, silo: str) -> None:
        """A round that has brought nothing stays spent; its silo is asked for the next one after this step."""
        self.arrivals.ended(silo)
        self._resting.add(silo)

    def _folded(self) -> list[str]:
        if self._all_used_up() and not self._has_enough_silos():
            self.arrivals.taken(self._step)
            self.updates = []
            self._say(
                "unused", f"step {self._step} changes nothing: every silo has given its {self.settings.rounds} rounds"
            )
            return []
        self.exchange.require(self._quorum, len(self.present()), str(self._step))
        self.arrivals.taken(self._step)
        return sorted({update.silo for update in self.updates})

    def _all_used_up(self) -> bool:
        """Whether no silo has anything left to give, whoever is there today."""
        rounds, tasks = self.settings.rounds, self.arrivals.tasks
        given = all(not task.open and task.round >= rounds for task in tasks.values())
        return given and bool(tasks) and set(self.present()) <= set(tasks)

    def _say(self, event: str, message: str, **values: Any) -> None:
        self.exchange.log.emit("federate", event, step=str(self._step), message=message, **values)
