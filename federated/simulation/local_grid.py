"""Flower's ``Grid`` over Ray actors: the same ServerApp and the same silo code, without SuperLink and polling."""

import pickle
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from types import TracebackType
from typing import Any, Protocol

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from configs.errors import InputError
from configs.imports import uncollected
from federated.transport.client_app import Handler, make_app
from federated.transport.flower_messages import size_bytes

_RUN_ID, _SERVER_NODE, _TASK_ID = 1, 1, 1
_FIRST_NODE = 1000
_SILO = "silo"
_WARM_SILOS = 64  # silos that a process keeps open at most
_AHEAD = 2  # calls that a process holds at most: the one it works on, and the next
_CALL_S = 0.02  # seconds of work in a call of several messages, which itself costs about a millisecond
_CALL_BYTES = 15 * 2**16  # of replies in such a call: Ray would put more into its object store, which is slower
_LOOK_AHEAD = 64  # waiting messages among which a process looks for those of silos that it holds
_WAIT_S = 0.5
_ELSEWHERE = 2  # how far a worker is from a silo that another one holds


class OpenedSilo(Protocol):
    """What a process hosts: ``federated.silo.silo.Silo``, for instance."""

    def handle(self, content: bytes) -> bytes:
        """Answers one request's envelope."""

    def close(self) -> None:
        """Lets go of the silo's files."""


OpenSilo = Callable[[str], OpenedSilo]


class SiloHost:
    """A process that hosts silos. Each is opened when a message for it comes, and stays warm while few others come.

    Args:
        open_silo: the pickled ``OpenSilo``; as it is, Ray would import all that it needs before the process is asked.
        threads: torch threads.
        warm: silos that are kept open at most.
    """

    def __init__(self, open_silo: bytes, threads: int, warm: int = _WARM_SILOS) -> None:
        with uncollected():
            import torch

            self._open_silo: OpenSilo = pickle.loads(open_silo)  # noqa: S301  # of the grid that started the process
        torch.set_num_threads(threads)
        self._most, self._silos = warm, OrderedDict[str, OpenedSilo]()
        self._app = make_app(self._connect)

    def _connect(self, context: Context, _timeout_s: float) -> Handler:
        name = str(context.node_config[_SILO])
        if name not in self._silos:
            while len(self._silos) >= self._most:
                self._silos.popitem(last=False)[1].close()  # the one that was asked least recently
            self._silos[name] = self._open_silo(name)
        self._silos.move_to_end(name)
        return self._silos[name].handle

    def handle(self, messages: list[Message], silos: list[str]) -> tuple[list[Message], float]:
        """Passes messages through the relay to their silos, one by one, until they have taken what a call may take.

        Returns:
            the replies to the first ones, one at least; and what these took, as a part of what a call may take.

        Raises:
            InputError: a wrong setting of the simulation, which is its user's and not the round's. All other mistakes
                come back as the error of their message's reply.
        """
        began, replies, replied_bytes, taken = time.perf_counter(), list[Message](), 0, 0.0
        for message, silo in zip(messages, silos, strict=True):
            replies.append(self._reply(message, silo))
            replied_bytes += size_bytes(replies[-1].content) if replies[-1].has_content() else 0
            taken = max((time.perf_counter() - began) / _CALL_S, replied_bytes / _CALL_BYTES)
            if taken >= 1:
                break
        return replies, taken

    def _reply(self, message: Message, silo: str) -> Message:
        context = Context(_RUN_ID, message.metadata.dst_node_id, {_SILO: silo}, RecordDict(), {})
        try:
            return self._app(message, context)
        except InputError:
            raise
        except Exception as error:
            return Message(Error(code=1, reason=str(error)), reply_to=message)


@dataclass(eq=False)
class _Worker:
    """A process, and the messages of each call that it was given, in the order in which it takes them."""

    actor: Any
    running: dict[Any, list[Message]] = field(default_factory=dict)

    def message_ids(self) -> list[str]:
        """Of all that it was given and has not answered."""
        return [message.metadata.message_id for messages in self.running.values() for message in messages]


class LocalGrid(Grid):
    """The silos of a simulation as Flower nodes; a free worker takes the next messages.

    A worker prefers the silos that it answered for last, which are warm there, and is given its next call before it has
    answered one; but the last messages of a step go to whichever is free first. A call holds one message, or several
    that take little work: as many as fit, by what the last messages of their type took, and at most a worker's share of
    those that wait. Messages that a call has no time for wait again.

    Args:
        ray: a running Ray.
        open_silo: opens a silo by name inside a worker.
        silos: names of the silos, one node each.
        workers: number of processes.
        threads: torch threads, and CPUs, of a process.
        kept: whether a silo stays open, in the process that was asked for it first: what it has in memory lasts.
    """

    def __init__(
        self, ray: Any, open_silo: OpenSilo, silos: Iterable[str], workers: int, threads: int, *, kept: bool = False
    ) -> None:
        self._ray, self._kept = ray, kept
        self._silo_of = dict(enumerate(sorted(silos), start=_FIRST_NODE))
        # No environment of its own for the process: Ray starts processes ahead, and an environment would not fit them.
        # It sets OMP_NUM_THREADS to num_cpus by itself, and torch's threads are set when the process starts.
        actor: Any = ray.remote(SiloHost).options(num_cpus=threads, max_restarts=0)
        given = (ray.cloudpickle.dumps(open_silo), threads, *((len(self._silo_of),) if kept else ()))
        self._start_worker: Callable[[], Any] = partial(actor.remote, *given)
        self._workers = [_Worker(self._start_worker()) for _ in range(min(workers, len(self._silo_of)))]
        self._home: dict[int, _Worker] = {}
        self._waiting: dict[str, Message] = {}
        self._replies: dict[str, Message] = {}
        self._fit: dict[str, float] = {}  # how many messages of a type a call can take
        self._alone: set[str] = set()  # messages that are asked one by one, since a call of theirs has failed
        self._next_id = 0
        # Flower's Message reads the identity of the task that makes it; SuperLink sets it in its own processes.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = _RUN_ID, _SERVER_NODE, _TASK_ID

    def __enter__(self) -> "LocalGrid":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            self._ray.kill(worker.actor, no_restart=True)

    def set_run(self, run: Run) -> None:
        """Does nothing: a grid has one run."""

    @property
    def run(self) -> Run:
        """The grid's one run."""
        return Run.create_empty(_RUN_ID)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """One node per silo, in the order of the silos' names."""
        return list(self._silo_of)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queues messages; free workers start at once."""
        ids = []
        for message in messages:
            self._next_id += 1
            message.metadata.__dict__["_message_id"] = str(self._next_id)
            ids.append(str(self._next_id))
            self._waiting[str(self._next_id)] = message
        self._dispatch()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages that have come; waits a moment where none has come yet.

        Args:
            message_ids: all that are still waited for. Replies to others, of a step that had enough, are dropped.
        """
        wanted = list(message_ids)
        if not any(message_id in self._replies for message_id in wanted):
            self._gather(timeout_s=_WAIT_S)
        replies, self._replies = self._replies, {}
        return [replies[message_id] for message_id in wanted if message_id in replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Sends messages and waits for all replies, or until the time is up."""
        waiting, replies = set(self.push_messages(messages)), list[Message]()
        deadline = None if timeout is None else time.monotonic() + timeout
        while waiting and (deadline is None or time.monotonic() < deadline):
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
        return replies

    def _dispatch(self) -> None:
        """Gives every process a call, and then a second one, but not of the last messages that are waiting."""
        for held in range(_AHEAD):
            for worker in self._workers:
                if len(worker.running) == held and len(self._waiting) > held * len(self._workers):
                    chosen = self._next_for(worker)
                    if not chosen:
                        continue
                    # What is asked alone has a process to itself: a reply may be lost when the next call ends it.
                    if self._alone.isdisjoint(chosen if held else ()) and self._alone.isdisjoint(worker.message_ids()):
                        self._call(worker, [self._waiting.pop(message_id) for message_id in chosen])

    def _call(self, worker: _Worker, messages: list[Message]) -> None:
        nodes = [message.metadata.dst_node_id for message in messages]
        self._home.update(dict.fromkeys(nodes, worker))
        # One list, so that the adapter, which a step's messages share, is written once.
        worker.running[worker.actor.handle.remote(messages, [self._silo_of[node] for node in nodes])] = messages

    def _next_for(self, worker: _Worker) -> list[str]:
        def distance(message_id: str) -> int:
            home = self._home.get(self._waiting[message_id].metadata.dst_node_id)
            return 0 if home is worker else 1 if home is None else _ELSEWHERE

        nearest = sorted(self._waiting if self._kept else islice(self._waiting, _LOOK_AHEAD), key=distance)
        if self._kept:
            nearest = [message_id for message_id in nearest if distance(message_id) < _ELSEWHERE]
        if not nearest:
            return []
        fit = int(self._fit.get(self._waiting[nearest[0]].metadata.message_type, 1))
        part = -(-len(self._waiting) // len(self._workers))
        chosen = nearest[: max(1, min(fit, part))]
        return chosen if self._alone.isdisjoint(chosen) else chosen[:1]

    def _gather(self, timeout_s: float) -> None:
        worker_of = {reference: worker for worker in self._workers for reference in worker.running}
        if not worker_of:
            return
        done, _ = self._ray.wait(list(worker_of), num_returns=1, timeout=timeout_s)
        for reference in done:
            worker = worker_of[reference]
            try:
                self._answer(worker, reference)
            except self._ray.exceptions.RayActorError as error:
                self._replace(worker, str(error))
        self._dispatch()

    def _answer(self, worker: _Worker, reference: Any) -> None:
        messages = worker.running[reference]
        try:
            replies, taken = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise error.cause from None
            self._failed(messages, str(error.cause))
        else:
            self._replies.update((reply.metadata.reply_to_message_id, reply) for reply in replies)
            self._wait_again(messages[len(replies) :])
            kind = messages[0].metadata.message_type
            # At most twice as many as before: a refusal among trainings is no sign that these are short work.
            self._fit[kind] = min(len(replies) / taken, 2 * self._fit.get(kind, 1.0))
        del worker.running[reference]

    def _replace(self, worker: _Worker, reason: str) -> None:
        """A new process for one that died. What it has not answered waits again.

        Asking again is safe: a silo that has answered before has kept its reply.
        """
        for reference in list(worker.running):
            try:
                self._answer(worker, reference)  # what it had answered before
            except self._ray.exceptions.RayActorError:
                break
        at, *later = worker.running.values()
        self._wait_again(list(chain(*later)))
        self._failed(at, reason)
        self._workers[self._workers.index(worker)] = _Worker(self._start_worker())
        self._home = {node: home for node, home in self._home.items() if home is not worker}

    def _failed(self, messages: list[Message], reason: str) -> None:
        """A call has ended without replies: its messages are asked one by one, and one that fails again is given up."""
        if messages[0].metadata.message_id in self._alone:
            message = messages[0]
            self._replies[message.metadata.message_id] = Message(Error(code=1, reason=reason), reply_to=message)
            return
        self._alone.update(message.metadata.message_id for message in messages)
        self._wait_again(messages)

    def _wait_again(self, messages: list[Message]) -> None:
        if messages:
            self._waiting = {message.metadata.message_id: message for message in messages} | self._waiting
