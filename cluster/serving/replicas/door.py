"""Where requests come in: each goes to a replica, and to another one if that dies before a word was answered.

Whatever is asked changes nothing, so that it may be asked twice. What a client has not got a byte of is asked again;
a stream that has begun can't be, and ends with an error.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from cluster.serving.answers import GONE, SLOW_S
from cluster.serving.app import LARGEST_BODY, PATHS, SPARE
from cluster.serving.claims import Claim
from cluster.serving.errors import FAILED, ApiError, too_many
from cluster.serving.guard import Guard
from cluster.serving.keys import ApiKeys
from cluster.serving.replicas.figures import DoorMetrics
from cluster.serving.replicas.replica import Report, report

_TRIES = 3  # of a request; one that three replicas have died of is not given to a fourth
_REPORT_S = 5.0
_STILL = ("/", "/docs", "/openapi.json", "/v1/models")  # the same from every replica, as long as they live
_DIED = ApiError(500, "the process that wrote this has died; ask again", "failed")


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
        self._office, self._claims, self._timeout_s, self._most, self._wanted = office, claims, timeout_s, most, wanted
        self._taken = 0
        self._still = {path: list[Message]() for path in (*_STILL, *(f"/v1/models/{name}" for name in claims))}
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
        asked = scope["method"], scope["path"]
        if asked == ("GET", "/health"):
            await (await self._health())(scope, receive, send)
        elif asked == ("GET", "/metrics"):
            page = self.metrics.page({name: one.metrics for name, one in (await self._reports()).items()})
            await Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")(scope, receive, send)
        elif asked[0] == "GET" and asked[1] in self._still:  # these wait for no slot
            await self._shown(scope, send)
        else:
            await self._handed_on(scope, receive, send)

    async def _shown(self, scope: Scope, send: Send) -> None:
        kept = self._still[scope["path"]]
        if not kept:
            found = [message async for message in self._asking.remote(_of_the_door(scope), b"")]
            if found[0]["status"] != 200:
                raise FAILED
            kept[:] = found
        for message in kept:
            await send(message)

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
        from ray.exceptions import RayActorError

        end = asyncio.get_running_loop().time() + self._timeout_s
        tries = 0
        try:
            async with asyncio.timeout_at(end) as limit:
                while True:
                    try:
                        async with aclosing(self._one_try(scope, body)) as messages:
                            async for message in messages:
                                await answer.add(message)
                                if answer.begun:
                                    limit.reschedule(end + SLOW_S)
                        return
                    except RayActorError:
                        tries += 1
                        if answer.begun or tries == _TRIES:
                            raise
                        answer.forget()
                        self.metrics.moved.inc()
        except TimeoutError:
            await answer.end(ApiError(504, "the answer took too long; ask for less", "timeout"))
        except RayActorError as error:
            self._failed(type(error).__name__)
            await answer.end(_DIED)

    async def _one_try(self, scope: Scope, body: bytes) -> AsyncGenerator[Message]:
        stream = self._asking.remote(scope, body)
        try:
            async for message in stream:
                yield message
        finally:
            stream.cancel()

    async def _reports(self) -> dict[str, Report]:
        """Of the replicas that answer."""
        known: dict[str, Any] = await self._office.known.remote()
        found = await asyncio.gather(*(self._report(name, actor) for name, actor in known.items()))
        return {name: one for name, one in zip(known, found, strict=True) if one is not None}

    async def _report(self, name: str, actor: Any) -> Report | None:
        from ray.exceptions import RayActorError

        try:
            async with asyncio.timeout(_REPORT_S):
                said: Report = await actor.__ray_call__.remote(report)
                return said
        except TimeoutError:
            return None
        except RayActorError:
            await self._office.leave.remote(name)
            return None

    async def _health(self) -> JSONResponse:
        """200 as long as one replica takes requests, and the service doesn't stop."""
        reports = await self._reports()
        ready = [one for one in reports.values() if one.ready]
        status = "stopping" if self.guard.stopping else "ok" if ready else "failed"
        document = {
            "status": status,
            "waiting": self._taken - sum(one.running for one in ready),
            "running": sum(one.running for one in ready),
            "replicas": {
                name: {"ready": one.ready, "waiting": one.waiting, "running": one.running}
                for name, one in reports.items()
            },
            "replicas_wanted": self._wanted,
            "models": {name: {"privacy": claim.document()} for name, claim in self._claims.items()},
        }
        return JSONResponse(document, 200 if status == "ok" else 503)


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
