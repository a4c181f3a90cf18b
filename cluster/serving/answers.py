"""From what the engine writes to OpenAI's documents: whole, or as server-sent events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from cluster.serving.errors import ApiError, stopping
from cluster.serving.metrics import ServingMetrics
from cluster.serving.models import ServedModel
from configs.errors import InputError
from trainer.inference.batching import Closed, Engine, Output, QueueFull
from trainer.inference.sampling import Sampling

SLOW_S = 30.0
GONE = 499  # nginx's status for a client that has gone


@dataclass(frozen=True)
class Question:
    """A request as the engine takes it.

    Attributes:
        served: the model.
        ids: the prompt's tokens.
        how: the answer's tokens are chosen.
        chat: whether it is a dialogue; else a text that is continued.
        counts: whether a stream ends with the numbers of tokens.
    """

    served: ServedModel
    ids: list[int]
    how: Sampling
    chat: bool
    counts: bool = False


class Answer:
    """One answer while it is written. Whoever has it must ``cancel`` it in the end: that frees the slot.

    Raises:
        ApiError: there is no room for it.
    """

    def __init__(self, engine: Engine, question: Question, metrics: ServingMetrics, timeout_s: float) -> None:
        self.question, self._metrics = question, metrics
        self._began, self._deadline = time.monotonic(), asyncio.get_running_loop().time() + timeout_s
        self._outputs = asyncio.Queue[Output]()
        loop = asyncio.get_running_loop()

        def take(output: Output) -> None:
            with suppress(RuntimeError):  # the loop has ended, and nobody listens
                loop.call_soon_threadsafe(self._outputs.put_nowait, output)

        name = question.served.name
        try:
            self._job = engine.submit(name, question.ids, question.how, take, continued=not question.chat)
        except QueueFull as error:
            raise ApiError(429, str(error), "rate_limit_exceeded") from None
        except Closed:
            raise stopping() from None
        except InputError as error:
            raise ApiError(400, str(error), "context_length_exceeded") from None
        metrics.tokens.labels(name, "prompt").inc(len(question.ids))
        self._tokens = 0

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self._job.cancel()

    async def outputs(self) -> AsyncIterator[Output]:
        """What comes, up to the end.

        Raises:
            ApiError: it took too long, or failed.
        """
        name = self.question.served.name
        while True:
            try:
                async with asyncio.timeout_at(self._deadline):
                    output = await self._outputs.get()
            except TimeoutError:
                raise ApiError(504, "the answer took too long; ask for fewer tokens", "timeout") from None
            if output.finish == "cancelled":
                raise stopping()
            if output.finish == "failed":
                raise ApiError(500, "the model failed at this request", "failed")
            if not self._tokens:
                self._metrics.first.labels(name).observe(time.monotonic() - self._began)
            self._metrics.tokens.labels(name, "completion").inc(output.tokens - self._tokens)
            self._tokens = output.tokens
            yield output
            if output.finish:
                self._metrics.whole.labels(name).observe(time.monotonic() - self._began)
                return

    def usage(self) -> dict[str, int]:
        """Tokens so far; the one that ends an answer counts."""
        asked = len(self.question.ids)
        return {
            "prompt_tokens": asked,
            "completion_tokens": self._tokens,
            "total_tokens": asked + self._tokens,
        }


async def whole(answer: Answer, request: Request) -> Response:
    """The answer as one document; None is sent to who has gone."""
    try:
        return await unless_gone(_written(answer), request)
    finally:
        answer.cancel()


async def unless_gone(work: Coroutine[Any, Any, dict[str, Any]], request: Request) -> Response:
    """The document that is made for a request. It is given up when who asked has gone, or nobody waits any more."""
    making, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((making, leaving), return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(making.result()) if making.done() else Response(status_code=GONE)
    finally:
        making.cancel()
        leaving.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _written(answer: Answer) -> dict[str, Any]:
    pieces, finish = [], ""
    async for output in answer.outputs():
        pieces.append(output.text)
        finish = output.finish
    text, chat = "".join(pieces), answer.question.chat
    said = {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
    choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
    return {**_frame(answer, "chat.completion"), "choices": [choice], "usage": answer.usage()}


def _frame(answer: Answer, of_chat: str) -> dict[str, Any]:
    chat = answer.question.chat
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": of_chat if chat else "text_completion",
        "created": int(time.time()),
        "model": answer.question.served.name,
    }


class Stream(StreamingResponse):
    """The answer as server-sent events. However it ends, the slot is free afterwards."""

    def __init__(self, answer: Answer, timeout_s: float) -> None:
        super().__init__(_events(answer), media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._answer, self._timeout_s = answer, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events, and then lets the slot go."""
        try:
            async with asyncio.timeout(self._timeout_s + SLOW_S):  # for who takes the events slower than they come
                await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


async def _events(answer: Answer) -> AsyncIterator[str]:
    frame = _frame(answer, "chat.completion.chunk")
    begun = not answer.question.chat
    try:
        async for output in answer.outputs():
            if not begun:  # with the first token and no sooner: what waits can still be given to another replica
                yield _event({**frame, "choices": [_choice(answer, {"role": "assistant", "content": ""})]})
                begun = True
            for choice in _choices(answer, output):
                yield _event({**frame, "choices": [choice]})
    except ApiError as error:
        yield _event(error.document)
        return
    if answer.question.counts:
        yield _event({**frame, "choices": [], "usage": answer.usage()})
    yield "data: [DONE]\n\n"


def _choices(answer: Answer, output: Output) -> Iterator[dict[str, Any]]:
    """A piece of text, where there is one, and then why it has ended."""
    if output.text:
        yield _choice(answer, {"content": output.text})
    if output.finish:
        yield {**_choice(answer, {}), "finish_reason": output.finish}


def _choice(answer: Answer, delta: dict[str, str]) -> dict[str, Any]:
    said = {"delta": delta} if answer.question.chat else {"text": delta.get("content", "")}
    return {"index": 0, **said, "logprobs": None, "finish_reason": None}


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document)}\n\n"
