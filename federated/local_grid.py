"""Flower's ``Grid`` over Ray actors: the same ServerApp and the same silo code, without SuperLink and polling."""

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from configs.errors import InputError
from federated.client_app import Handler, make_app

OpenSilo = Callable[[str], Handler]
_RUN_ID, _SERVER_NODE, _TASK_ID = 1, 1, 1
_FIRST_NODE = 1000
_SILO = "silo"


class SiloHost:
    """A process that hosts silos. Each is opened when its first message comes, and stays warm."""

    def __init__(self, open_silo: OpenSilo, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._open_silo, self._handlers = open_silo, dict[str, Handler]()
        self._app = make_app(self._connect)

    def _connect(self, context: Context) -> Handler:
        name = str(context.node_config[_SILO])
        if name not in self._handlers:
            self._handlers[name] = self._open_silo(name)
        return self._handlers[name]

    def handle(self, message: Message, silo: str) -> Message:
        """One message through the relay to its silo. The steward's own mistakes come back as the reply's error."""
        context = Context(_RUN_ID, message.metadata.dst_node_id, {_SILO: silo}, RecordDict(), {})
        return self._app(message, context)


class LocalGrid(Grid):
    """The silos of a simulation as Flower nodes; a free worker takes the next message.

    Args:
        ray: a running Ray.
        open_silo: opens a silo by name inside a worker.
        silos: names of the silos, one node each.
        workers: number of processes.
        threads: torch threads, and CPUs, of a process.
    """

    def __init__(self, ray: Any, open_silo: OpenSilo, silos: Iterable[str], workers: int, threads: int) -> None:
        self._ray = ray
        self._silo_of = dict(enumerate(sorted(silos), start=_FIRST_NODE))
        actor: Any = ray.remote(SiloHost)
        actor = actor.options(
            num_cpus=threads, max_restarts=0, runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}}
        )
        self._start_worker: Callable[[], Any] = partial(actor.remote, open_silo, threads)
        self._free = [self._start_worker() for _ in range(min(workers, len(self._silo_of)))]
        self._workers = list(self._free)
        self._queue: deque[Message] = deque()
        self._running: dict[Any, tuple[Any, Message]] = {}
        self._replies: dict[str, Message] = {}
        self._next_id = 0
        # Flower's Message reads the identity of the task that makes it; SuperLink sets it in its own processes.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = _RUN_ID, _SERVER_NODE, _TASK_ID

    def __enter__(self) -> "LocalGrid":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            self._ray.kill(worker, no_restart=True)

    def set_run(self, run: Run) -> None:
        """There is one run a grid."""

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
        """One node a silo, in the order of the silos' names."""
        return list(self._silo_of)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queues messages; free workers start at once."""
        ids = []
        for message in messages:
            self._next_id += 1
            message.metadata.__dict__["_message_id"] = str(self._next_id)
            ids.append(str(self._next_id))
            self._queue.append(message)
        self._dispatch()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages that have come."""
        self._gather(timeout_s=0.05)
        return [self._replies.pop(message_id) for message_id in list(message_ids) if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Sends messages and waits for all replies, or until the time is up."""
        import time

        waiting, replies = set(self.push_messages(messages)), list[Message]()
        deadline = None if timeout is None else time.monotonic() + timeout
        while waiting and (deadline is None or time.monotonic() < deadline):
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
        return replies

    def _dispatch(self) -> None:
        while self._queue and self._free:
            message, worker = self._queue.popleft(), self._free.pop()
            reference = worker.handle.remote(message, self._silo_of[message.metadata.dst_node_id])
            self._running[reference] = (worker, message)

    def _gather(self, timeout_s: float) -> None:
        if not self._running:
            return
        done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout_s)
        for reference in done:
            worker, message = self._running.pop(reference)
            try:
                self._replies[message.metadata.message_id] = self._result(reference, message)
            except self._ray.exceptions.RayActorError as error:  # the process died: a new one takes its place
                self._replies[message.metadata.message_id] = Message(Error(code=1, reason=str(error)), reply_to=message)
                self._workers.remove(worker)
                worker = self._start_worker()
                self._workers.append(worker)
            self._free.append(worker)
        self._dispatch()

    def _result(self, reference: Any, message: Message) -> Message:
        try:
            reply: Message = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise error.cause from None  # a wrong setting of the simulation is its user's, not the round's
            return Message(Error(code=1, reason=str(error.cause)), reply_to=message)
        return reply
