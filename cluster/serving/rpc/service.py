"""The operations of a service over gRPC: the same requests, checks, limits and keys as over HTTP."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2
from pydantic import BaseModel, ValidationError

from cluster.serving.answers import SLOW_S, Answer
from cluster.serving.app import LARGEST_BODY, Service, not_valid
from cluster.serving.errors import FAILED, ApiError, too_many
from cluster.serving.guard import ARRIVAL_S, arriving
from cluster.serving.requests import ChatRequest, CompletionRequest, ExplainRequest, PredictRequest
from cluster.serving.rpc import serving_pb2 as pb
from configs.errors import InputError

SERVICE = "siloweave.serving.v1.Serving"
Asked = TypeVar("Asked", bound=BaseModel)
Parsed = TypeVar("Parsed", bound=Message)
Sent = TypeVar("Sent")
_SILENT_MS = 20_000  # a client that answers no ping for so long has gone
_IDLE_MS = 60_000
_AGE_MS = 300_000  # then a connection takes no more calls; gRPC's clients open another by themselves
_QUESTIONS = 32  # about health, beside the requests
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class _Calls:
    """What each call does: it takes a message's bytes and gives messages."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def complete(self, content: bytes) -> AsyncIterator[Message]:
        asked = _request(content, pb.CompletionRequest, CompletionRequest)
        async for answer in self._written(asked):
            yield answer

    async def chat(self, content: bytes) -> AsyncIterator[Message]:
        asked = _request(content, pb.ChatRequest, ChatRequest)
        async for answer in self._written(asked):
            yield answer

    async def predict(self, content: bytes) -> AsyncIterator[Message]:
        found = await self._service.predicted(_request(content, pb.PredictRequest, PredictRequest))
        shown = [{**one, "probabilities": one["probabilities"] or {}} for one in found["predictions"]]
        yield ParseDict({"predictions": shown}, pb.PredictReply())

    async def explain(self, content: bytes) -> AsyncIterator[Message]:
        found = await self._service.explained(_request(content, pb.ExplainRequest, ExplainRequest))
        yield ParseDict({"explanations": found["explanations"]}, pb.ExplainReply())

    async def models(self, _content: bytes) -> AsyncIterator[Message]:
        found = await self._service.list_models()
        yield ParseDict({"models": found["data"]}, pb.ListModelsReply(), ignore_unknown_fields=True)

    async def _written(self, asked: CompletionRequest | ChatRequest) -> AsyncIterator[Message]:
        answer: Answer = await self._service.begin(asked)
        try:
            async for output in answer.outputs():
                counts = answer.usage()
                yield pb.Answer(
                    text=output.text,
                    finish_reason=output.finish,
                    prompt_tokens=counts["prompt_tokens"],
                    completion_tokens=counts["completion_tokens"],
                )
        finally:
            answer.cancel()


async def _together(answers: AsyncIterator[Any]) -> Message:
    """The pieces of an answer as one."""
    pieces = [answer async for answer in answers]
    whole: Message = pieces[-1]
    if isinstance(whole, pb.Answer):
        whole.text = "".join(answer.text for answer in pieces)
    return whole


async def _only(messages: AsyncIterator[bytes]) -> bytes:
    """The one message of a call. gRPC itself would wait for it without end, and before anybody is asked for a key."""
    async with arriving():
        first, second = await anext(messages, None), await anext(messages, None)
    if first is None or second is not None:
        raise ApiError(400, "a call brings one message; send one", "invalid_value")
    return first


def _parsed(content: bytes, kind: type[Parsed]) -> Parsed:
    try:
        return kind.FromString(content)
    except (DecodeError, UnicodeDecodeError, ValueError):
        said = "the message is none of this call's, is compressed, or has invalid UTF-8"
        raise ApiError(400, said, "invalid_value") from None


def _request(content: bytes, kind: type[Message], model: type[Asked]) -> Asked:
    """A message as the request that HTTP would have brought, by the same checks."""
    message = _parsed(content, kind)
    try:
        document = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    except ValueError:
        raise ApiError(400, "the message has a number that JSON has not; send finite ones", "invalid_value") from None
    try:
        sampling = document.pop("sampling", {})
        return model.model_validate({**document, **sampling})
    except ValidationError as error:
        raise not_valid(error.errors()) from None


class _Places:
    """For calls up to their very end: a reply that nobody takes keeps its call for as long as its connection lasts."""

    def __init__(self, most: int) -> None:
        self._most, self._taken = most, 0

    def take(self, context: Any) -> None:
        """Gives a call its place.

        Raises:
            ApiError: there is none.
        """
        self._taken += 1
        context.add_done_callback(self._leave)
        if self._taken > self._most:
            raise too_many()

    def _leave(self, _context: Any) -> None:
        self._taken -= 1


class _Guarded:
    """What every call passes first, and how it ends. Each is a stream of one message, which is the same on the wire."""

    def __init__(
        self, service: Service, places: _Places, name: str, call: Callable[[bytes], AsyncIterator[Message]]
    ) -> None:
        self._service, self._guard, self._places, self._name, self._call = service, service.guard, places, name, call

    async def whole(self, messages: AsyncIterator[bytes], context: Any) -> Message | None:
        """One message."""

        async def send(content: bytes) -> Message:
            return await _together(self._call(content))

        return await self._ended(messages, send, context)

    async def stream(self, messages: AsyncIterator[bytes], context: Any) -> None:
        """A message for each piece."""

        async def send(content: bytes) -> None:
            answers = self._call(content)
            try:
                async for answer in answers:
                    await context.write(answer)
            finally:
                await answers.aclose()  # type: ignore[attr-defined]  # a generator: its slot is free now, not some time

        await self._ended(messages, send, context)

    async def _ended(
        self, messages: AsyncIterator[bytes], send: Callable[[bytes], Awaitable[Sent]], context: Any
    ) -> Sent | None:
        code = grpc.StatusCode.CANCELLED
        self._guard.active += 1
        try:
            keys = dict(context.invocation_metadata() or ())
            self._guard.admit(str(keys.get("authorization", "")).encode())
            self._places.take(context)
            content = await _only(messages)
            async with asyncio.timeout(self._service.timeout_s + SLOW_S):  # for who takes pieces slower than they come
                found = await send(content)
            code = grpc.StatusCode.OK
            return found
        except ApiError as error:
            code = _CODES.get(error.status, grpc.StatusCode.INTERNAL)
            refusal = error.message
        except TimeoutError:
            code, refusal = grpc.StatusCode.DEADLINE_EXCEEDED, "the answer was not taken in time"
        except Exception as error:  # its message may quote a prompt: only its kind is told
            self._guard.failed(type(error).__name__)
            code, refusal = grpc.StatusCode.INTERNAL, FAILED.message
        finally:
            self._guard.active -= 1
            self._guard.count(f"grpc {self._name}", code.name)
        await context.abort(code, refusal)
        return None


def _health(service: Service) -> Any:
    """Computed when it is asked for, without a key; ``Watch`` would hold a call for ever."""
    reply, places = health_pb2.HealthCheckResponse, _Places(_QUESTIONS)

    async def check(messages: AsyncIterator[bytes], context: Any) -> Any:
        try:
            places.take(context)
            question = _parsed(await _only(messages), health_pb2.HealthCheckRequest)
            if question.service not in ("", SERVICE):
                raise ApiError(404, "no such service here", "not_found")
        except ApiError as error:
            await context.abort(_CODES[error.status], error.message)
        return reply(status=reply.SERVING if service.ready else reply.NOT_SERVING)

    handler = grpc.stream_unary_rpc_method_handler(check, response_serializer=_bytes)
    return grpc.method_handlers_generic_handler(health.SERVICE_NAME, {"Check": handler})


def _handlers(service: Service) -> Any:
    calls, places = _Calls(service), _Places(service.guard.most)
    handlers = {}
    table = {"Complete": calls.complete, "Chat": calls.chat, "Predict": calls.predict, "Explain": calls.explain}
    for name, call in {**table, "ListModels": calls.models}.items():
        handlers[name] = grpc.stream_unary_rpc_method_handler(
            _Guarded(service, places, name, call).whole, response_serializer=_bytes
        )
    for name in ("StreamComplete", "StreamChat"):
        guarded = _Guarded(service, places, name, table[name.removeprefix("Stream")])
        handlers[name] = grpc.stream_stream_rpc_method_handler(guarded.stream, response_serializer=_bytes)
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


def _bytes(message: Message) -> bytes:
    return message.SerializeToString()


@asynccontextmanager
async def serving(service: Service, address: str) -> AsyncIterator[None]:
    """Answers over gRPC while the block lasts.

    Args:
        service: the models.
        address: host and port.

    Raises:
        InputError: somebody else has the port.
    """
    most = service.guard.most + _QUESTIONS
    longest_s = ARRIVAL_S + service.timeout_s + SLOW_S
    options = {
        "grpc.max_receive_message_length": LARGEST_BODY,
        "grpc.per_message_decompression": 0,  # nothing is inflated: what comes compressed is no message here
        "grpc.so_reuseport": 0,
        "grpc.keepalive_time_ms": _SILENT_MS,
        "grpc.keepalive_timeout_ms": _SILENT_MS,
        "grpc.http2.max_pings_without_data": 0,
        "grpc.max_concurrent_streams": most,
        "grpc.max_connection_idle_ms": _IDLE_MS,
        "grpc.max_connection_age_ms": _AGE_MS,
        "grpc.max_connection_age_grace_ms": int(longest_s * 1000),  # no call is cut before its time
    }
    refused = most  # so many more may be told that there is no room
    server = grpc.aio.server(options=list(options.items()), maximum_concurrent_rpcs=most + refused)
    # Else a traceback is printed for each client that goes before it has taken its reply.
    logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)
    server.add_generic_rpc_handlers((_handlers(service), _health(service)))
    try:
        server.add_insecure_port(address)
    except RuntimeError:
        raise InputError(f"--grpc-port: {address} has a service there already; give another port, or 0") from None
    await server.start()
    try:
        yield
    finally:
        await server.stop(grace=1)
