"""Where requests come in: each goes to a replica, and to another one if that dies before a word was answered.

Whatever is asked changes nothing, so that it may be asked twice. What a client has not got a byte of is asked again;
a stream that has begun can't be, and ends with an error.
"""

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from functools import partial
from typing import Any
from urllib.parse import quote

from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from cluster.serving.answers import GONE, SLOW_S
from cluster.serving.app import LARGEST_BODY, PATHS, SPARE
from cluster.serving.claims import Claim, documents
from cluster.serving.errors import FAILED, NO_SUCH_METHOD, ApiError, too_many
from cluster.serving.guard import Guard
from cluster.serving.keys import ApiKeys
from cluster.serving.replicas.figures import DoorMetrics
from cluster.serving.replicas.reports import Reports
from cluster.serving.replicas.shared import Shared

_DEATHS = 3  # what three replicas have died of is not given to a fourth
_TRIES = 8  # of a request whose replicas can't be reached: each pause is longer than the last, 7 s in all
_PAUSE_S = 0.25
_STILL = ("/", "/docs", "/openapi.json", "/v1/models")  # the same from every replica, as long as they live
DIED = ApiError(500, "the process that wrote this has died; ask again", "failed")
UNREACHED = ApiError(500, "the process that wrote this can't be reached; ask again", "failed")


class Door:
    """An application that has others answer.

    Args:
        handle: of the replicas in Ray Serve.
        office: the actor that knows them.
        claims: about the models, by name.
        keys: whose requests are taken; None: anybody's.
        timeout_s: longest that an answer may take.
        most: requests that have or may wait for a slot.
        wanted: replicas.
    """

    def __init__(
        self,
        handle: Any,
        office: Any,
        claims: Mapping[str, Claim],
        keys: ApiKeys | None,
        timeout_s: float,
        most: int,
        wanted: int,
    ) -> None:
        self._asking = handle.options(stream=True, method_name="asgi")
        self._claims, self._timeout_s, self._most, self._wanted = claims, timeout_s, most, wanted
        self._taken = 0
        self._reports = Reports(office, lambda: self._taken)
        paths = (*_STILL, *(f"/v1/models/{name}" for name in claims))
        self._still = {path: Shared(partial(self._fetched, path), math.inf) for path in paths}
        self._shown = {"/health": self._health, "/metrics": self._metrics, **dict.fromkeys(paths, self._page)}
        self.metrics = DoorMetrics(wanted)
        self.guard = Guard(self, keys, LARGEST_BODY, most + SPARE)
        self.guard.count = self._counted
        self.guard.failed = self._failed

    def _failed(self, kind: str) -> None:
        self.metrics.failures.labels(kind).inc()

    def _counted(self, path: str, status: int | str) -> None:
        self.metrics.requests.labels(path if path in PATHS or path in self._still else "other", status).inc()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or has it answered."""
        if scope["type"] != "http":
            return
        if scope["path"] not in self._shown:
            await self._handed_on(scope, receive, send)
        elif scope["method"] == "GET":  # these wait for no slot
            await self._shown[scope["path"]](scope, receive, send)
        else:
            raise ApiError(405, NO_SUCH_METHOD, "invalid_request")

    async def _page(self, scope: Scope, _: Receive, send: Send) -> None:
        for message in await self._still[scope["path"]].get():
            await send(message)

    async def _fetched(self, path: str) -> list[Message]:
        """A page, whole, however many replicas die meanwhile."""
        found = list[Message]()
        asked = {"method": "GET", "path": path, "raw_path": quote(path).encode(), "query_string": b"", "headers": []}
        with self._plainly():
            async with (
                asyncio.timeout(self._timeout_s),
                aclosing(self._asked(_of_the_door(asked), b"", lambda: False)) as messages,
            ):
                async for message in messages:
                    found = [*found, message] if message else []
        if found[0]["status"] != 200:
            raise FAILED
        return found

    async def _handed_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._taken >= self._most:
            raise too_many()
        body = (await receive()).get("body", b"")  # the guard has read it whole
        answer = _Sent(send)
        self._taken += 1
        answering = asyncio.create_task(self._answered(_of_the_door(scope), body, answer))
        leaving = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
            elif not answer.begun:
                await Response(status_code=GONE)(scope, receive, send)
        finally:
            self._taken -= 1
            for task in (answering, leaving):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task

    async def _answered(self, scope: Scope, body: bytes, answer: "_Sent") -> None:
        end = asyncio.get_running_loop().time() + self._timeout_s
        try:
            with self._plainly():
                async with (
                    asyncio.timeout_at(end) as limit,
                    aclosing(self._asked(scope, body, lambda: answer.begun)) as messages,
                ):
                    async for message in messages:
                        if message is None:
                            answer.forget()
                            continue
                        await answer.add(message)
                        if answer.begun:
                            limit.reschedule(end + SLOW_S)
        except ApiError as error:
            await answer.end(error)

    @contextmanager
    def _plainly(self) -> Iterator[None]:
        """What Ray and the clock raise, as a client is told it."""
        from ray.exceptions import ActorUnavailableError, RayActorError

        try:
            yield
        except TimeoutError:
            raise ApiError(504, "the answer took too long; ask for less", "timeout") from None
        except RayActorError as error:
            self._failed(type(error).__name__)
            raise (UNREACHED if isinstance(error, ActorUnavailableError) else DIED) from None

    async def _asked(self, scope: Scope, body: bytes, begun: Callable[[], bool]) -> AsyncGenerator[Message | None]:
        """Asks, and asks again where a replica dies before the answer has begun.

        Yields:
            ASGI's messages; None: those until now don't count.

        Raises:
            RayActorError: the answer had begun, or too many replicas have died or not been reached.
        """
        from ray.exceptions import ActorUnavailableError, RayActorError

        deaths = 0
        for tries in range(1, _TRIES + 1):
            try:
                async with aclosing(self._one_try(scope, body)) as messages:
                    async for message in messages:
                        yield message
                return
            except RayActorError as error:
                deaths += not isinstance(error, ActorUnavailableError)
                if begun() or deaths == _DEATHS or tries == _TRIES:
                    raise
            yield None
            self.metrics.moved.inc()
            await asyncio.sleep(_PAUSE_S * tries)

    async def _one_try(self, scope: Scope, body: bytes) -> AsyncGenerator[Message]:
        stream = self._asking.remote(scope, body)
        try:
            async for message in stream:
                yield message
        finally:
            stream.cancel()

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        seen = await self._reports.seen()
        page = self.metrics.page({name: one.metrics for name, one in seen.replicas.items()})
        await Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")(scope, receive, send)

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        """200 as long as one replica takes requests, and the service doesn't stop."""
        seen = await self._reports.seen()
        ready = any(one.ready for one in seen.replicas.values())
        status = "stopping" if self.guard.stopping else "ok" if ready else "failed"
        document = {
            "status": status,
            "waiting": seen.waiting,
            "running": seen.running,
            "replicas": {
                name: {"ready": one.ready, "waiting": one.waiting, "running": one.running}
                for name, one in seen.replicas.items()
            },
            "replicas_wanted": self._wanted,
            "models": documents(self._claims),
        }
        await JSONResponse(document, 200 if status == "ok" else 503)(scope, receive, send)


class _Sent:
    """What a client has got. An answer's head is kept until a part of its body is there: until then it can be another.

    Attributes:
        begun: whether something was sent.
    """

    def __init__(self, send: Send) -> None:
        self._send, self._kept = send, list[Message]()
        self._events = False
        self.begun = False

    async def add(self, message: Message) -> None:
        """Sends a message, or keeps it."""
        self._kept.append(message)
        if message["type"] == "http.response.start":
            self._events = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
            return
        self.begun = True
        while self._kept:
            await self._send(self._kept.pop(0))

    def forget(self) -> None:
        """What was kept is not sent."""
        self._kept.clear()

    async def end(self, error: ApiError) -> None:
        """The answer has no other end: a stream's clients read an error, and those of a whole document a cut line.

        Raises:
            ApiError: nothing was sent yet.
        """
        if not self.begun:
            raise error
        if self._events:
            event = f"data: {json.dumps(error.document)}\n\n".encode()
            with suppress(TimeoutError):  # who reads nothing is not waited for
                async with asyncio.timeout(SLOW_S):
                    await self._send({"type": "http.response.body", "body": event, "more_body": False})


def _of_the_door(scope: Scope) -> dict[str, Any]:
    """A request as the door asks it: no key and no name of a client goes on to the replicas."""
    headers = [pair for pair in scope["headers"] if pair[0] == b"content-type"]
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "root_path": "",
        **{name: scope[name] for name in ("method", "path", "raw_path", "query_string") if name in scope},
        "headers": [(b"host", b"127.0.0.1"), *headers],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
    }


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
