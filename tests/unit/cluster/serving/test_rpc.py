"""The service over gRPC: the same answers and the same refusals as over HTTP, and calls that end free their slots."""

import asyncio
import threading
from contextlib import contextmanager

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ports import free_port
from served_models import CONTEXT, a_labelling_run, a_model
from service_client import SECRET, ask

from cluster.serving.app import LARGEST_BODY, Service
from cluster.serving.keys import ApiKeys
from cluster.serving.models import ServedModel, find, load
from cluster.serving.rpc import serving_pb2 as pb
from cluster.serving.rpc import serving_pb2_grpc
from cluster.serving.rpc.service import SERVICE, serving
from configs.errors import InputError
from trainer.inference.batching import Engine, EngineLimits

TASKS = {"classification": ("bad", "good"), "multilabel": ("red", "old"), "entities": ("O", "B-PER"), "qa": ()}
LONG = pb.CompletionRequest(model="ship", prompt="the old ship", sampling=pb.Sampling(max_tokens=1000, temperature=0))
SHORT = pb.CompletionRequest(model="ship", prompt="the old ship", sampling=pb.Sampling(max_tokens=8, temperature=0))
KEY = "key-of-the-clinic-0001"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = a_model(folder / "ship")
    runs = [a_labelling_run(folder / task, base, task, labels)[0] for task, labels in TASKS.items()]
    return load([find(str(place), None) for place in (base, *runs)], None)


@pytest.fixture
def service_of(served):
    engines = []

    def make(keys=None, slots=2, waiting=2, timeout_s=300.0):
        writing = {name: one.voice for name, one in served.items() if isinstance(one, ServedModel)}
        engines.append(Engine(writing, EngineLimits(slots, slots * CONTEXT, waiting)))
        return Service(served, engines[-1], keys, timeout_s, slots + waiting)

    yield make
    for engine in engines:
        engine.close()


def over_grpc(service, conversation, *more):
    """What a conversation by stubs of a service gives; it is served for as long as that lasts."""

    async def served():
        address = f"127.0.0.1:{free_port()}"
        async with serving(service, address), grpc.aio.insecure_channel(address) as channel:
            return await conversation(serving_pb2_grpc.ServingStub(channel), *(stub(channel) for stub in more))

    return asyncio.run(served())


def call(service, name, request, **options):
    """The answer; of a stream, all of them."""

    async def called(stub):
        calling = getattr(stub, name)(request, **options)
        return [answer async for answer in calling] if name.startswith("Stream") else await calling

    return over_grpc(service, called)


def refusal(service, name, request, **options):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        call(service, name, request, **options)
    return refused.value.code(), refused.value.details()


def by_http(service, path, document):
    (response,) = ask(service, ("POST", path, {"json": document}))
    return response


@contextmanager
def held(service):
    """Each answer stands still after its first token, until the block ends: no answer is over too early."""
    go, submit = threading.Event(), service._engine.submit

    def standing(voice, ids, how, on_output, *, continued):
        return submit(voice, ids, how, lambda output: (on_output(output), go.wait(300)), continued=continued)

    service._engine.submit = standing
    try:
        yield
    finally:
        del service._engine.submit
        go.set()


async def idle(service):
    while service._engine.running or service.guard.active:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7, "seed": -(2**40), "top_k": 9, "top_p": 0.8, "stop": ["e"]}])
def test_texts_and_chats_are_those_of_http_whole_and_in_pieces(how, service_of):
    service, how = service_of(), {"max_tokens": 20, "temperature": 0, "repetition_penalty": 1.1, **how}
    turns = [{"role": "developer", "content": "be short"}, {"role": "user", "content": "<|im_end|> the ship"}]
    for name, path, document, kind in (
        ("Complete", "/v1/completions", {"prompt": ""}, pb.CompletionRequest),
        ("Complete", "/v1/completions", {"prompt": "the red"}, pb.CompletionRequest),
        ("Chat", "/v1/chat/completions", {"messages": turns}, pb.ChatRequest),
    ):
        expected = by_http(service, path, {"model": "ship", **document, **how}).json()
        (choice,) = expected["choices"]
        text = choice["text"] if name == "Complete" else choice["message"]["content"]
        request = kind(model="ship", **document, sampling=pb.Sampling(**how))
        whole = call(service, name, request)
        assert (whole.text, whole.finish_reason) == (text, choice["finish_reason"])
        counts = {kind: expected["usage"][kind] for kind in ("prompt_tokens", "completion_tokens")}
        assert {kind: getattr(whole, kind) for kind in counts} == counts
        *pieces, last = call(service, f"Stream{name}", request)
        assert "".join(piece.text for piece in (*pieces, last)) == text
        assert {piece.finish_reason for piece in pieces} <= {""}
        assert (last.finish_reason, last.completion_tokens) == (choice["finish_reason"], counts["completion_tokens"])


def records(task):
    return {
        "entities": [{"tokens": ["the", "old", "ship"]}, {"tokens": ["ship"]}],
        "qa": [{"context": "the ship sails to island 7", "question": "which ship?"}],
    }.get(task, [{"text": "the old ship"}, {"text": "an island"}])


@pytest.mark.parametrize("task", TASKS)
def test_labels_and_words_are_those_of_http(task, service_of):
    service, asked = service_of(), []
    for record in records(task):
        asked.append(Struct())
        asked[-1].update(record)
    expected = by_http(service, "/predict", {"model": task, "records": records(task)}).json()["predictions"]
    found = call(service, "Predict", pb.PredictRequest(model=task, records=asked))
    shown = [MessageToDict(one) for one in found.predictions]
    assert [one["answer"] for one in shown] == [one["answer"] for one in expected]
    assert [one.get("probabilities") for one in shown] == [one["probabilities"] for one in expected]
    if task != "qa":
        words = by_http(service, "/explain", {"model": task, "text": "the old ship"}).json()["explanations"]
        found = call(service, "Explain", pb.ExplainRequest(model=task, text="the old ship"))
        assert [MessageToDict(one, always_print_fields_with_no_presence=True) for one in found.explanations] == words


def test_models_are_listed_with_what_is_claimed_of_them(service_of):
    service = service_of()
    (listed,) = ask(service, ("GET", "/v1/models", {}))
    found = call(service, "ListModels", pb.ListModelsRequest()).models
    expected = {one["id"]: one for one in listed.json()["data"]}
    assert [one.id for one in found] == list(expected)
    for one in found:
        about = expected[one.id]
        assert (one.context_length, one.task) == (about["context_length"], about.get("task", ""))
        assert (list(one.labels), list(one.fields)) == (about.get("labels", []), about.get("fields", []))
        assert one.privacy.line == about["privacy"]["line"]
        assert not one.privacy.HasField("epsilon")


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"model": "none"}, grpc.StatusCode.NOT_FOUND),
        ({"model": "qa"}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"max_tokens": 0}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"max_tokens": CONTEXT}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"prompt": f"{SECRET} " * CONTEXT}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"temperature": -1.0}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"top_p": 1.5}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"stop": [SECRET] * 5}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"stop": [""]}, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_refusals_are_those_of_http_by_grpcs_codes(change, status, service_of):
    service = service_of()
    document = {"model": "ship", "prompt": SECRET, **change}
    expected = by_http(service, "/v1/completions", document).json()["error"]["message"]
    sampling = {name: value for name, value in change.items() if name not in ("model", "prompt")}
    given = {name: document[name] for name in ("model", "prompt")}
    request = pb.CompletionRequest(**given, sampling=pb.Sampling(**sampling))
    for name in ("Complete", "StreamComplete"):
        assert refusal(service, name, request) == (status, expected)
    assert SECRET not in expected


def test_numbers_that_are_none_and_bytes_that_are_no_message_are_refused(service_of):
    service = service_of()
    for value in (float("nan"), float("inf")):
        request = pb.CompletionRequest(model="ship", prompt="a", sampling=pb.Sampling(temperature=value))
        assert refusal(service, "Complete", request)[0] is grpc.StatusCode.INVALID_ARGUMENT

    async def raw(stub):
        codes = []
        for content in (b"\xff" * 9, b"\x0a\x04ship\x12\x02\xff\xfe"):  # no message; a prompt of invalid UTF-8
            stub.Complete._request_serializer = lambda _, content=content: content
            try:
                await stub.Complete(SHORT)
            except grpc.aio.AioRpcError as error:
                codes.append((error.code(), error.details()))
        return codes

    said = "the message is none of this call's, is compressed, or has invalid UTF-8"
    assert over_grpc(service, raw) == [(grpc.StatusCode.INVALID_ARGUMENT, said)] * 2


def test_a_bad_record_is_named_by_its_place(service_of):
    good, bad = Struct(), Struct()
    good.update({"text": "a"})
    bad.update({"words": SECRET})
    request = pb.PredictRequest(model="classification", records=[good, bad])
    code, said = refusal(service_of(), "Predict", request)
    assert (code, said) == (grpc.StatusCode.INVALID_ARGUMENT, "records.1: classification reads text; send nothing else")
    assert refusal(service_of(), "Predict", pb.PredictRequest(model="classification"))[1].startswith("records: ")


def test_without_its_key_nobody_is_answered(service_of, tmp_path):
    file = tmp_path / "keys"
    file.write_text(KEY)
    file.chmod(0o600)
    service = service_of(ApiKeys(file))
    for metadata in ((), (("authorization", "Bearer another-key-0001"),), (("authorization", KEY),)):
        for name, request in (("Complete", SHORT), ("StreamComplete", SHORT), ("ListModels", pb.ListModelsRequest())):
            code, said = refusal(service, name, request, metadata=metadata)
            assert code is grpc.StatusCode.UNAUTHENTICATED
            assert KEY not in said
    assert call(service, "Complete", SHORT, metadata=(("authorization", f"Bearer {KEY}"),)).completion_tokens


def test_a_call_that_is_cancelled_or_past_its_deadline_frees_its_slot(service_of):
    service = service_of(slots=1, waiting=0)

    async def leave(stub):
        stream = stub.StreamComplete(LONG)
        await anext(aiter(stream))
        stream.cancel()
        await idle(service)
        with held(service):
            going = stub.Complete(LONG)  # gone while it waits for the whole
            while not service._engine.running:
                await asyncio.sleep(0.01)
            going.cancel()
        await idle(service)
        with held(service), pytest.raises(grpc.aio.AioRpcError) as late:
            await stub.Complete(LONG, timeout=0.05)
        await idle(service)
        return late.value.code(), (await stub.Complete(SHORT)).completion_tokens

    assert over_grpc(service, leave) == (grpc.StatusCode.DEADLINE_EXCEEDED, 8)
    page = service.metrics.page().decode()
    assert 'siloweave_requests_total{path="grpc StreamComplete",status="CANCELLED"} 1.0' in page
    assert 'siloweave_requests_total{path="grpc Complete",status="OK"} 1.0' in page


def test_an_answer_that_takes_too_long_is_ended_by_the_service(service_of):
    service = service_of(timeout_s=0.05)
    for name in ("Complete", "StreamComplete"):
        code, said = refusal(service, name, LONG)
        assert (code, said) == (grpc.StatusCode.DEADLINE_EXCEEDED, "the answer took too long; ask for fewer tokens")


def test_too_many_and_too_much_exhaust_a_resource(service_of):
    service = service_of(slots=1, waiting=0)

    async def crowd(stub):
        with held(service), pytest.raises(grpc.aio.AioRpcError) as refused:
            stream = stub.StreamComplete(LONG)
            await anext(aiter(stream))
            await stub.Complete(SHORT)
        stream.cancel()
        await idle(service)
        return refused.value

    turned_away = over_grpc(service, crowd)
    assert turned_away.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert turned_away.details().startswith("all slots are taken")
    large = pb.CompletionRequest(model="ship", prompt="a" * LARGEST_BODY)
    assert refusal(service, "Complete", large)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_health_is_asked_without_a_key_and_a_service_that_stops_takes_no_more(service_of):
    service = service_of()

    async def stopping(stub, health):
        before = [(await health.Check(health_pb2.HealthCheckRequest(service=name))).status for name in ("", SERVICE)]
        service.guard.stopping = True
        after = (await health.Check(health_pb2.HealthCheckRequest())).status
        codes = []
        for calling in (
            health.Check(health_pb2.HealthCheckRequest(service="other")),
            stub.Complete(SHORT),
        ):
            try:
                await calling
            except grpc.aio.AioRpcError as error:
                codes.append(error.code())
        return before, after, codes

    before, after, codes = over_grpc(service, stopping, health_pb2_grpc.HealthStub)
    status = health_pb2.HealthCheckResponse
    assert (before, after) == ([status.SERVING] * 2, status.NOT_SERVING)
    assert codes == [grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE]


def test_a_failure_inside_is_counted_by_its_kind_and_says_nothing(service_of, served, monkeypatch):
    service = service_of()

    def fails(prompt):
        raise ZeroDivisionError(prompt)

    monkeypatch.setattr(served["ship"], "opening", fails)
    request = pb.CompletionRequest(model="ship", prompt=SECRET)
    assert refusal(service, "Complete", request) == (
        grpc.StatusCode.INTERNAL,
        "the service failed at this request",
    )
    assert 'siloweave_failures_total{kind="ZeroDivisionError"} 1.0' in service.metrics.page().decode()


def test_a_port_that_somebody_has_is_one_clear_line(service_of):
    service = service_of()

    async def twice():
        address = f"127.0.0.1:{free_port()}"
        async with serving(service, address), serving(service, address):
            pass

    with pytest.raises(InputError, match=r"--grpc-port: 127\.0\.0\.1:\d+ has a service there already"):
        asyncio.run(twice())
