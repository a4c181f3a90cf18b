"""What the service answers over HTTP: the right documents, and one clear line for whatever is wrong."""

import json
import os
import random

import pytest
from served_models import CONTEXT, a_model
from service_client import SECRET, ask, refused

from cluster.serving.app import Service
from cluster.serving.keys import ApiKeys
from cluster.serving.models import find, load
from cluster.serving.server import listen
from configs.errors import InputError
from trainer.inference.batching import Engine, EngineLimits
from trainer.inference.sampling import Sampling

ASKED = {"model": "model", "prompt": "the old ship", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    places = [a_model(folder / "model"), a_model(folder / "no-chat", chat=False, seed=1)]
    return load([find(str(place), None) for place in places], None)


@pytest.fixture
def service_of(served):
    engines = []

    def make(keys=None, slots=4, waiting=8, timeout_s=60.0):
        voices = {name: one.voice for name, one in served.items()}
        engines.append(Engine(voices, EngineLimits(slots, slots * CONTEXT, waiting)))
        return Service(served, engines[-1], keys, timeout_s, slots + waiting)

    yield make
    for engine in engines:
        engine.close()


def post(service, document, path="/v1/completions", **options):
    content = json.dumps(document).encode() if isinstance(document, dict) else document
    headers = {"content-type": "application/json", **options.pop("headers", {})}
    (response,) = ask(service, ("POST", path, {"content": content, "headers": headers}))
    return response


@pytest.mark.parametrize(
    ("headers", "taken"),
    [
        ({}, True),
        ({"host": "127.0.0.1:8000"}, True),
        ({"host": "[::1]:8000", "origin": "http://[::1]:8000"}, True),
        ({"host": "evil.example:8000"}, False),
        ({"host": "localhost.evil.example"}, False),
        ({"host": "["}, False),
        ({"host": ""}, False),
        ({"origin": "http://evil.example"}, False),
        ({"origin": "null"}, False),
        ({"origin": "http://localhost:3000"}, False),
    ],
)
def test_a_page_of_another_site_reaches_nothing_without_keys(headers, taken, service_of, tmp_path):
    """It can have a browser ask loopback, by a name of its own as well."""
    service = service_of()
    if taken:
        assert post(service, ASKED, headers=headers).status_code == 200
        return
    refused(post(service, ASKED, headers=headers), 403, "sender, Host or Origin is none of this machine's")
    for path in ("/", "/health", "/v1/models"):
        refused(ask(service, ("GET", path, {"headers": headers}))[0], 403, "Host or Origin")
    file = tmp_path / "keys"
    file.touch(0o600)
    file.write_text("k" * 32)
    signed = {**headers, "authorization": f"Bearer {'k' * 32}"}
    assert post(service_of(ApiKeys(file)), ASKED, headers=signed).status_code == 200


def test_a_text_goes_on_alike_whole_and_as_events(service_of):
    service = service_of()
    whole = post(service, ASKED).json()
    assert whole["choices"][0]["finish_reason"] == "length"
    usage = whole["usage"]
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8
    events = post(service, {**ASKED, "stream": True, "stream_options": {"include_usage": True}})
    assert events.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in events.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == whole["choices"][0]["text"]
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], usage)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]][-1] == "length"


def test_many_at_once_get_what_each_gets_alone(service_of):
    service = service_of(slots=4, waiting=16)
    asked = [{**ASKED, "prompt": "the red ship " * number, "temperature": 0.9, "seed": number} for number in range(12)]
    together = ask(service, *(("POST", "/v1/completions", {"json": one}) for one in asked))
    alone = [post(service, one) for one in asked]
    texts = [[response.json()["choices"][0]["text"] for response in found] for found in (together, alone)]
    assert texts[0] == texts[1]


def test_a_chat_is_answered_in_the_models_own_template(service_of, served):
    service = service_of()
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a ship"}]},
    ]
    found = post(service, {"model": "model", "messages": messages, "max_completion_tokens": 5}, "/v1/chat/completions")
    ids, _ = served["model"].dialogue([("system", "Be brief."), ("user", "a ship")])
    assert found.json()["usage"]["prompt_tokens"] == len(ids)
    assert found.json()["choices"][0]["message"]["role"] == "assistant"
    refused(post(service, {"model": "no-chat", "messages": messages}, "/v1/chat/completions"), 400, "no chat template")


def test_a_stop_string_ends_a_text(service_of):
    service = service_of()
    text = post(service, {**ASKED, "max_tokens": 40}).json()["choices"][0]["text"]
    stopped = post(service, {**ASKED, "max_tokens": 40, "stop": [text[5:8]]}).json()["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == (text[: text.index(text[5:8])], "stop")


def chat(content, **others):
    return {"model": "model", "messages": [{"role": "user", "content": content}], **others}


IMAGE = {"type": "image_url", "image_url": {"url": f"data:{SECRET}"}}


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("completions", b"{", 400, "no JSON"),
        ("completions", b"[" * 100_000, 400, "can't be read as JSON"),
        ("completions", b'{"model": "model", "prompt": "\xff"}', 400, "can't be read as JSON"),
        ("completions", rb'{"model": "model", "prompt": "\ud800"}', 400, "prompt: Value error, has half of"),
        ("completions", b"", 400, "the body: Field required"),
        ("completions", b"[]", 400, "the body: Input should be a valid dictionary"),
        ("completions", b"x" * (2**20 + 1), 413, "1048576 bytes"),
        ("completions", {**ASKED, "model": "none"}, 404, "no such model here; there is model, no-chat"),
        ("completions", {**ASKED, "prompt": [SECRET]}, 400, "prompt: Input should be a valid string"),
        ("completions", {**ASKED, "prompt": f"{SECRET} " * CONTEXT}, 400, "reads and writes 1024 tokens"),
        ("completions", {**ASKED, "max_tokens": CONTEXT}, 400, "shorten one of them"),
        ("completions", {**ASKED, "max_tokens": 0}, 400, "max_tokens"),
        ("completions", {**ASKED, "temperature": SECRET}, 400, "temperature"),
        ("completions", b'{"model": "model", "prompt": "a", "temperature": NaN}', 400, "finite number"),
        ("completions", {**ASKED, "n": 2}, 400, "n: Input should be 1"),
        ("completions", {**ASKED, "seed": 2**63}, 400, "seed"),
        ("completions", {**ASKED, "stop": ["a"] * 5}, 400, "stop"),
        ("completions", {**ASKED, "stop": ""}, 400, "stop"),
        ("completions", {**ASKED, "logit_bias": {SECRET: 1}}, 400, "logit_bias"),
        ("completions", {**ASKED, "grammar": SECRET}, 400, "grammar: is not known here; leave it out"),
        ("chat/completions", chat([IMAGE]), 400, "messages.0.content.0.type: this model reads text alone"),
        ("chat/completions", chat(SECRET, tools=[{"type": "function"}]), 400, "tools"),
        ("chat/completions", {"model": "model", "messages": []}, 400, "messages"),
        ("chat/completions", {"model": "model", "messages": [{"role": "tool", "content": SECRET}]}, 400, "role"),
        ("chat/completions", chat("a", response_format={"type": "json_object"}), 400, "response_format"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line_without_what_was_asked(service_of, path, body, status, message):
    refused(post(service_of(), body, f"/v1/{path}"), status, message)


def test_any_bytes_are_answered_by_a_refusal(service_of):
    service, draws = service_of(), random.Random(0)
    whole = json.dumps({**ASKED, "stop": ["x"], "stream_options": {"include_usage": True}}).encode()
    for _ in range(300):
        body = bytearray(whole)
        for _ in range(draws.randrange(1, 4)):
            body[draws.randrange(len(body))] = draws.randrange(256)
        assert post(service, bytes(body)).status_code in (200, 400, 404)
    assert ask(service, ("GET", "/health", {}))[0].json()["status"] == "ok"
    assert b"siloweave_failures_total{" not in service.metrics.page()


def test_other_paths_and_methods_are_refused(service_of):
    service = service_of()
    for method, path in (("GET", "/v1/completions"), ("POST", "/"), ("PUT", "/health")):
        refused(*ask(service, (method, path, {})), 405, "no such method")
    assert [one.status_code for one in ask(service, ("HEAD", "/", {}), ("HEAD", "/health", {}))] == [405, 405]
    refused(*ask(service, ("GET", f"/{SECRET}", {})), 404, "no such path")
    refused(*ask(service, ("GET", "/v1/models/none", {})), 404, "no such model")
    assert SECRET.encode() not in service.metrics.page()


def test_a_key_is_needed_for_all_but_health(service_of, tmp_path):
    path = tmp_path / "keys"
    path.write_text("# of the clinic\nkey-of-the-clinic-0001\n\nkey-of-the-clinic-0002\n")
    path.chmod(0o600)
    service = service_of(ApiKeys(path))
    for paths in ("/v1/models", "/metrics", "/docs", "/openapi.json", "/v1/completions"):
        refused(*ask(service, ("GET", paths, {})), 401, "missing or wrong")
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        refused(*ask(service, (method, "/", {})), 401, "missing or wrong")
        refused(*ask(service, (method, "/health", {})), 401, "missing or wrong")
    for header in (
        "Bearer key-of-the-clinic-0003",
        "Bearer ",
        "Basic key-of-the-clinic-0001",
        "Bearer # of the clinic",
    ):
        refused(post(service, ASKED, headers={"authorization": header}), 401, "missing or wrong")
    for key in ("0001", "0002"):
        found = post(service, ASKED, headers={"authorization": f"Bearer key-of-the-clinic-{key}"})
        assert found.status_code == 200
    assert ask(service, ("GET", "/health", {}))[0].status_code == 200


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        ("key-of-the-clinic-0001", 0o640, "lets others read it"),
        ("", 0o600, "holds no key"),
        ("# only words\n", 0o600, "holds no key"),
        ("short", 0o600, "key 1 has fewer than 16 characters"),
        ("key-of-the-clinic-0001\nkey of the clinic 2", 0o600, "key 2 has fewer than 16 characters, or blanks"),
    ],
)
def test_a_file_of_keys_that_is_none_is_refused(tmp_path, content, mode, message):
    path = tmp_path / "keys"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(InputError, match=message) as caught:
        ApiKeys(path)
    assert "clinic" not in str(caught.value)


def test_who_comes_when_all_places_are_taken_is_told_to_come_again(service_of):
    service = service_of(slots=1, waiting=0)
    asked = {**ASKED, "max_tokens": 400}
    found = ask(service, *(("POST", "/v1/completions", {"json": asked}) for _ in range(6)))
    by_status = [response.status_code for response in found]
    assert set(by_status) == {200, 429}
    turned_away = found[by_status.index(429)]
    assert refused(turned_away, 429, "all slots are taken")["code"] == "rate_limit_exceeded"
    assert turned_away.headers["retry-after"] == "1"


def test_an_answer_that_takes_too_long_is_ended_and_its_slot_is_free(service_of):
    service = service_of(slots=1, timeout_s=0.05)
    refused(post(service, {**ASKED, "max_tokens": 900}), 504, "took too long")
    events = post(service, {**ASKED, "max_tokens": 900, "stream": True})
    assert json.loads(events.text.split("\n\n")[-2].removeprefix("data: "))["error"]["code"] == "timeout"
    assert "[DONE]" not in events.text
    ended = []
    service._engine.submit("model", [1], Sampling(1), ended.append, continued=False)
    while not ended:
        pass
    assert ended[0].finish == "length"


def test_a_failure_inside_is_counted_by_its_kind_and_says_nothing(service_of, served, monkeypatch):
    service = service_of()

    def fails(prompt):
        raise ZeroDivisionError(prompt)

    monkeypatch.setattr(served["model"], "opening", fails)
    refused(post(service, {**ASKED, "prompt": SECRET}), 500, "the service failed at this request")
    monkeypatch.undo()
    monkeypatch.setattr(served["model"], "opening", lambda _: [10**6])  # no such token: the decoding thread fails
    refused(post(service, ASKED), 500, "the model failed at this request")
    monkeypatch.undo()
    assert post(service, ASKED).status_code == 200
    page = service.metrics.page().decode()
    assert 'siloweave_failures_total{kind="ZeroDivisionError"} 1.0' in page
    assert 'siloweave_failures_total{kind="IndexError"} 1.0' in page


def test_a_service_that_stops_takes_no_more(service_of):
    service = service_of()
    service.guard.stopping = True
    refused(post(service, ASKED), 503, "is stopping")
    (health,) = ask(service, ("GET", "/health", {}))
    assert (health.status_code, health.json()["status"]) == (503, "stopping")


def test_metrics_count_what_was_done(service_of):
    service = service_of()
    asked = post(service, ASKED).json()["usage"]
    page = service.metrics.page().decode()
    assert f'siloweave_tokens_total{{kind="prompt",model="model"}} {asked["prompt_tokens"]:.1f}' in page
    assert 'siloweave_tokens_total{kind="completion",model="model"} 8.0' in page
    assert 'siloweave_first_token_seconds_count{model="model"} 1.0' in page
    assert 'siloweave_requests_total{path="/v1/completions",status="200"} 1.0' in page
    assert "siloweave_requests_running 0.0" in page


def test_the_page_of_paths_needs_nothing_from_elsewhere(service_of):
    (page,) = ask(service_of(), ("GET", "/docs", {}))
    assert "POST /v1/chat/completions" in page.text
    assert "http" not in page.text
    assert "<script" not in page.text


def test_a_port_that_is_taken_is_one_clear_line():
    with listen("127.0.0.1", 0, 5) as first:
        port = first.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}: 127.0.0.1 has a service there already"):
            listen("127.0.0.1", port, 5)
    with pytest.raises(InputError, match="can't listen there"):
        listen("no such host", 0, 5)
    if os.getuid():
        with pytest.raises(InputError, match="can't listen there"):
            listen("127.0.0.1", 1, 5)
