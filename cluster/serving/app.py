"""The application: what is answered at which path."""

import asyncio
import time
from collections.abc import Coroutine, Mapping, Sequence
from html import escape
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response

from cluster.serving.answers import Answer, Question, Stream, unless_gone, whole
from cluster.serving.claims import Claim, documents
from cluster.serving.errors import FAILED, NO_SUCH_METHOD, ApiError
from cluster.serving.guard import Guard
from cluster.serving.keys import ApiKeys
from cluster.serving.labels import LabelModel
from cluster.serving.metrics import ServingMetrics
from cluster.serving.models import ServedModel
from cluster.serving.page import page
from cluster.serving.requests import ChatRequest, CompletionRequest, ExplainRequest, PredictRequest
from configs.errors import InputError
from trainer.inference.batching import Engine

LARGEST_BODY = 2**20
SPARE = 32  # requests that are being read, or refused
_CALLS = ("ListModels", "Complete", "StreamComplete", "Chat", "StreamChat", "Predict", "Explain")
PATHS = (
    *(f"grpc {call}" for call in _CALLS),
    "/",
    "/health",
    "/metrics",
    "/docs",
    "/openapi.json",
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
    "/predict",
    "/explain",
)


class Service:
    """The models of one process over HTTP.

    Args:
        models: by name.
        engine: that decodes for those of them that write.
        keys: whose requests are taken; None: anybody's.
        timeout_s: longest that an answer may take.
        most: requests that have or may wait for a slot.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel | LabelModel],
        engine: Engine,
        keys: ApiKeys | None,
        timeout_s: float,
        most: int,
    ) -> None:
        self._models, self._engine, self.timeout_s = dict(models), engine, timeout_s
        self._began = int(time.time())
        self.metrics = ServingMetrics(lambda: self.waiting, lambda: self.running)
        self.guard = Guard(self._app(), keys, LARGEST_BODY, most + SPARE)
        self.guard.count = self._counted
        self.guard.failed = engine.on_failure = self._failed

    @property
    def claims(self) -> dict[str, Claim]:
        """What is claimed of the models' privacy, by name."""
        return {name: served.claim for name, served in self._models.items()}

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return self._engine.waiting

    @property
    def running(self) -> int:
        """Requests with a slot."""
        return self._engine.running

    def close(self) -> None:
        """Ends the thread that decodes."""
        self._engine.close()

    def _failed(self, kind: str) -> None:
        self.metrics.failures.labels(kind).inc()

    def _counted(self, path: str, status: int | str) -> None:
        known = path if path in PATHS or path.removeprefix("/v1/models/") in self._models else "other"
        self.metrics.requests.labels(known, status).inc()

    def _app(self) -> FastAPI:
        app = FastAPI(title="Siloweave", docs_url=None, redoc_url=None)
        app.add_exception_handler(RequestValidationError, _not_valid)
        app.add_exception_handler(HTTPException, _plain)
        app.add_exception_handler(ApiError, _refused)
        app.add_exception_handler(Exception, _failed)
        app.post("/v1/completions", response_model=None)(self.completions)
        app.post("/v1/chat/completions", response_model=None)(self.chat)
        app.post("/predict", response_model=None)(self.predict)
        app.post("/explain", response_model=None)(self.explain)
        app.get("/v1/models")(self.list_models)
        app.get("/v1/models/{name}")(self.one_model)
        app.get("/health", response_model=None)(self.health)
        app.get("/metrics", response_model=None)(self.read_metrics)
        app.get("/", response_model=None, include_in_schema=False)(page)
        app.get("/docs", response_model=None, include_in_schema=False)(lambda: HTMLResponse(_page(app.openapi())))
        return app

    async def completions(self, asked: CompletionRequest, request: Request) -> Response:
        """Goes on with a text."""
        return await self._sent(asked, request)

    async def chat(self, asked: ChatRequest, request: Request) -> Response:
        """Answers the last message of a dialogue, in the model's own chat template."""
        return await self._sent(asked, request)

    async def _sent(self, asked: CompletionRequest | ChatRequest, request: Request) -> Response:
        answer = await self.begin(asked)
        return Stream(answer, self.timeout_s) if asked.stream else await whole(answer, request)

    async def begin(self, asked: CompletionRequest | ChatRequest) -> Answer:
        """An answer that is being written. Whoever takes it has to cancel it in the end.

        Raises:
            ApiError: it is refused.
        """
        served = self._writing(asked.model)
        ids: list[int]
        ends: tuple[int, ...] = served.ends
        if isinstance(asked, CompletionRequest):
            ids = await anyio.to_thread.run_sync(served.opening, asked.prompt)
        else:
            try:
                turns = [message.turn() for message in asked.messages]
                ids, ends = await anyio.to_thread.run_sync(served.dialogue, turns)
            except InputError as error:
                raise ApiError(400, str(error), "invalid_value", "messages") from None
        return self._begun(asked, served, ids, ends)

    async def predict(self, asked: PredictRequest, request: Request) -> Response:
        """Gives labels to records, or finds the answers to questions in them."""
        return await unless_gone(self.predicted(asked), request)

    async def explain(self, asked: ExplainRequest, request: Request) -> Response:
        """Says how much each word of a text speaks for the answer, in nats (integrated gradients)."""
        return await unless_gone(self.explained(asked), request)

    async def predicted(self, asked: PredictRequest) -> dict[str, Any]:
        """The document that answers records.

        Raises:
            ApiError: it is refused, or took too long.
        """
        served = self._labelling(asked.model, "ask it at /v1/completions")
        return await self._in_time(served.answer(asked.records), "records", "fewer records")

    async def explained(self, asked: ExplainRequest) -> dict[str, Any]:
        """The document that weighs a text's words.

        Raises:
            ApiError: it is refused, or took too long.
        """
        served = self._labelling(asked.model, "`siloweave explain` weighs the words for what it writes")
        return await self._in_time(served.explain(asked.text), "text", "a shorter text")

    async def _in_time(self, work: Coroutine[Any, Any, dict[str, Any]], field: str, less: str) -> dict[str, Any]:
        try:
            async with asyncio.timeout(self.timeout_s):
                return await work
        except TimeoutError:
            raise ApiError(504, f"the answer took too long; send {less}", "timeout") from None
        except InputError as error:
            raise ApiError(400, str(error), "invalid_value", field) from None

    async def list_models(self) -> dict[str, Any]:
        """The models, and what is claimed of their privacy."""
        return {"object": "list", "data": [self._described(served) for served in self._models.values()]}

    async def one_model(self, name: str) -> dict[str, Any]:
        """One of them."""
        return self._described(self._served(name))

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self._engine.alive and not self.guard.stopping

    async def health(self) -> JSONResponse:
        """Whether requests are taken: 200, or 503 while the service stops or where it can't decode any more."""
        status = "failed" if not self._engine.alive else "stopping" if self.guard.stopping else "ok"
        document = {
            "status": status,
            "waiting": self.waiting,
            "running": self.running,
            "models": documents(self.claims),
        }
        return JSONResponse(document, 200 if status == "ok" else 503)

    async def read_metrics(self) -> Response:
        """Counters for Prometheus."""
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _writing(self, name: str) -> ServedModel:
        served = self._served(name)
        if isinstance(served, LabelModel):
            raise ApiError(400, f"{name} gives labels and writes no text; ask it at /predict", "invalid_value", "model")
        return served

    def _labelling(self, name: str, elsewhere: str) -> LabelModel:
        served = self._served(name)
        if not isinstance(served, LabelModel):
            raise ApiError(400, f"{name} writes; {elsewhere}", "invalid_value", "model")
        return served

    def _served(self, name: str) -> ServedModel | LabelModel:
        if name not in self._models:
            known = ", ".join(self._models)
            raise ApiError(404, f"no such model here; there is {known}", "model_not_found", "model")
        return self._models[name]

    def _described(self, served: ServedModel | LabelModel) -> dict[str, Any]:
        return {
            "id": served.name,
            "object": "model",
            "created": self._began,
            "owned_by": "siloweave",
            "context_length": served.context_length,
            "privacy": served.claim.document(),
            **(served.about if isinstance(served, LabelModel) else {}),
        }

    def _begun(
        self, asked: CompletionRequest | ChatRequest, served: ServedModel, ids: list[int], ends: tuple[int, ...]
    ) -> Answer:
        room = served.context_length - len(ids)
        most = room if asked.most is None else asked.most
        if most > room or room < 1:
            raise ApiError(
                400,
                f"{served.name} reads and writes {served.context_length} tokens; the prompt has {len(ids)} and "
                f"the answer may take {max(most, 1)}: shorten one of them",
                "context_length_exceeded",
            )
        counts = bool(asked.stream_options and asked.stream_options.include_usage)
        question = Question(served, ids, asked.sampling(most, ends), isinstance(asked, ChatRequest), counts)
        return Answer(self._engine, question, self.metrics, self.timeout_s)


def not_valid(found: Sequence[Mapping[str, Any]]) -> ApiError:
    """A field that is wrong, and why; never what it holds. Where a field may be several things, the nearest counts.

    Args:
        found: what pydantic has against a request.
    """
    first: Mapping[str, Any] = max(found, key=lambda one: len(one["loc"]), default={})
    parts = [str(part) for part in first.get("loc", ())]
    field = ".".join(part for part in parts if part != "str" and "[" not in part)[:200]  # without a union's branches
    said = str(first.get("msg", "is not valid")) if first.get("type") != "extra_forbidden" else _UNKNOWN
    if first.get("type") == "literal_error" and field.endswith(".type"):
        said = "this model reads text alone; send a part of type 'text'"
    return ApiError(400, f"{field or 'the body'}: {said}", "invalid_value", field or None)


async def _not_valid(_request: Request, error: Exception) -> Response:
    found = error.errors() if isinstance(error, RequestValidationError) else []
    if any(one["type"] == "json_invalid" for one in found):
        return ApiError(400, "the body is no JSON; send one object", "invalid_json").response()
    return not_valid([{**one, "loc": one["loc"][1:]} for one in found]).response()


_UNKNOWN = "is not known here; leave it out"


async def _refused(_request: Request, error: Exception) -> Response:
    return (error if isinstance(error, ApiError) else FAILED).response()


async def _failed(_request: Request, _error: Exception) -> Response:
    return FAILED.response()


async def _plain(_request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    said = {404: "no such path; see /docs", 405: NO_SUCH_METHOD}
    return ApiError(status, said.get(status, "the body can't be read as JSON"), "invalid_request").response()


def _page(schema: Mapping[str, Any]) -> str:
    """The paths as a page that needs nothing from elsewhere."""
    rows = [
        f"<tr><td><code>{escape(method.upper())} {escape(path)}</code><td>{escape(about.get('description', ''))}"
        for path, methods in schema["paths"].items()
        for method, about in methods.items()
    ]
    fields = [
        f"<h3>{escape(name)}</h3><p>{escape(about.get('description', ''))}</p><pre>"
        + escape("\n".join(about.get("properties", {})))
        + "</pre>"
        for name, about in schema["components"]["schemas"].items()
        if "properties" in about
    ]
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><title>Siloweave</title><h1>Siloweave</h1>'
    link = '<p><a href="/openapi.json">openapi.json</a></p>'
    return f"{head}{link}<table>{''.join(rows)}</table>{''.join(fields)}</html>"
