"""One of several processes that serve the same models: the whole application, asked through Ray Serve."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.types import Message

from cluster.serving.app import Service
from cluster.serving.replicas.offer import Offer, service_of
from configs.errors import InputError, SiloweaveError

NAMESPACE = "siloweave"  # of the office's name in the cluster
_here: list[Service] = []  # this process's service, for ``report``


@dataclass(frozen=True)
class Report:
    """What a replica says of itself.

    Attributes:
        ready: whether it takes requests.
        waiting: requests without a slot.
        running: requests with one.
        metrics: its page for Prometheus.
    """

    ready: bool
    waiting: int
    running: int
    metrics: bytes


def report(_actor: Any) -> Report:
    """What the replica in this process says of itself; called in it by Ray, which gives the actor."""
    if not _here:
        return Report(False, 0, 0, b"")
    service = _here[0]
    return Report(service.ready, service.waiting, service.running, service.metrics.page())


class Office:
    """Where replicas say that they are there. It ends with the command that has made it, whichever way that ends."""

    def __init__(self) -> None:
        self._replicas: dict[str, Any] = {}
        self._refusals = list[str]()

    def join(self, name: str, actor: Any) -> None:
        """A replica is ready."""
        self._replicas[name] = actor

    def leave(self, name: str) -> None:
        """A replica is gone."""
        self._replicas.pop(name, None)

    def refuse(self, line: str) -> None:
        """A replica can't serve, and why."""
        self._refusals.append(line)

    def known(self) -> dict[str, Any]:
        """The replicas' actors by name."""
        return self._replicas

    def refusal(self) -> str:
        """Why a replica could not serve; empty: none has said so."""
        return self._refusals[0] if self._refusals else ""


class Replica:
    """A process with the models of an offer.

    Args:
        office: name of the actor to which it says that it is there.
        application: its name in Ray Serve, which it ends when nobody asks it any more.
        offer: what is served.

    Raises:
        InputError: a model can't be served; the office has the line, too.
    """

    def __init__(self, office: str, application: str, offer: Offer) -> None:
        import ray

        self._office, self._application = office, application
        known: Any = ray.get_actor(office, namespace=NAMESPACE)
        try:
            self._service = service_of(offer, None)
        except (InputError, SiloweaveError) as error:
            ray.get(known.refuse.remote(str(error)))
            raise
        _here[:] = [self._service]
        context = ray.get_runtime_context()
        ray.get(known.join.remote(str(context.get_actor_id())[:12], context.current_actor))

    async def asgi(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """Answers one request.

        Args:
            scope: of ASGI.
            body: the whole of it.

        Yields:
            ASGI's messages of the answer. Whoever takes no more frees the request's slot.
        """
        messages = asyncio.Queue[Message | None]()
        arrived: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if not arrived:
                await asyncio.Event().wait()  # who has gone is told by cancelling
            return arrived.pop()

        async def answer() -> None:
            try:
                await self._service.guard(scope, receive, messages.put)
            finally:
                messages.put_nowait(None)

        answering = asyncio.create_task(answer())
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            answering.cancel()
            with suppress(asyncio.CancelledError):
                await answering

    def check_health(self) -> None:
        """Asked by Ray Serve every 10 s, which replaces a replica that fails.

        Where the office has ended, its command was killed: nobody asks these replicas any more, and they end.

        Raises:
            SiloweaveError: the replica decodes no more.
        """
        import ray
        from ray import serve

        try:
            ray.get_actor(self._office, namespace=NAMESPACE)
        except ValueError:
            ending = {"target": serve.delete, "args": (self._application,), "kwargs": {"_blocking": False}}
            threading.Thread(**ending, daemon=True).start()  # type: ignore[arg-type]
        if not self._service.ready:
            raise SiloweaveError("the replica decodes no more")
