"""What the door does when a replica dies at each point of an answer. The replicas are real, with no Ray between."""

import json
import queue

import pytest
from ray.exceptions import ActorDiedError
from served_models import CONTEXT, a_model
from service_client import SECRET, ask, refused

from cluster.serving.app import Service
from cluster.serving.keys import ApiKeys
from cluster.serving.models import find, load
from cluster.serving.replicas.door import Door
from cluster.serving.replicas.replica import Replica
from configs.errors import SiloweaveError
from trainer.inference.batching import Engine, EngineLimits

KEY = "key-of-the-clinic-0001"
ASKED = {"model": "model", "prompt": f"the {SECRET}", "max_tokens": 20, "temperature": 0}


class Stream:
    """A replica's answer, of which only so many messages come before its process dies."""

    def __init__(self, messages, left):
        self._messages, self._left = messages, left

    def __aiter__(self):
        return self._until_death()

    async def _until_death(self):
        try:
            async for message in self._messages:
                if self._left == 0:
                    raise ActorDiedError
                self._left -= 1
                yield message
        finally:
            await self._messages.aclose()

    def cancel(self):
        pass


class Replicas:
    """Stands for Ray Serve: the n-th request reaches a replica that dies after ``deaths[n]`` messages."""

    def __init__(self, service):
        self._replica = object.__new__(Replica)
        self._replica._service = service
        self.deaths, self.asked = [], []

    def options(self, **_):
        return self

    def remote(self, scope, body):
        self.asked.append((scope, body))
        return Stream(self._replica.asgi(scope, body), self.deaths.pop(0) if self.deaths else -1)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return load([find(str(a_model(tmp_path_factory.mktemp("models") / "model")), None)], None)


@pytest.fixture
def replicas(served):
    engine = Engine({name: one.voice for name, one in served.items()}, EngineLimits(2, 2 * CONTEXT, 4))
    yield Replicas(Service(served, engine, None, 60.0, 6))
    engine.close()


@pytest.fixture
def door_of(replicas, served):
    claims = {name: one.claim for name, one in served.items()}
    return lambda keys=None, most=6, timeout_s=60.0: Door(replicas, None, claims, keys, timeout_s, most, 2)


def post(door, document=ASKED, **headers):
    content = document if isinstance(document, bytes) else json.dumps(document).encode()
    given = {"content-type": "application/json", **headers}
    return ask(door, ("POST", "/v1/completions", {"content": content, "headers": given}))[0]


def events(response):
    return [
        json.loads(line.removeprefix("data: ")) for line in response.text.splitlines() if line.startswith("data: {")
    ]


def texts(response):
    return "".join(event["choices"][0]["text"] for event in events(response) if "choices" in event)


def moved(door):
    return door.metrics.moved._value.get()


@pytest.mark.parametrize("deaths", [[], [0], [1], [1, 0]])
def test_an_answer_of_which_nothing_was_sent_comes_from_another_replica(deaths, door_of, replicas):
    door = door_of()
    expected = post(door).json()["choices"]
    replicas.deaths = list(deaths)
    assert post(door).json()["choices"] == expected
    assert moved(door) == len(deaths)
    replicas.deaths = list(deaths)
    streamed = post(door, {**ASKED, "stream": True})
    assert texts(streamed) == expected[0]["text"]
    assert streamed.text.endswith("data: [DONE]\n\n")


def test_a_stream_that_has_begun_ends_with_an_error_and_is_not_begun_again(door_of, replicas):
    door = door_of()
    whole = post(door).json()["choices"][0]["text"]
    replicas.deaths = [4]
    cut = post(door, {**ASKED, "stream": True})
    assert whole.startswith(texts(cut))
    assert texts(cut) not in ("", whole)
    assert "has died; ask again" in events(cut)[-1]["error"]["message"]
    assert "[DONE]" not in cut.text
    assert (moved(door), len(replicas.asked)) == (0, 2)


def test_what_three_replicas_have_died_of_is_not_given_to_a_fourth(door_of, replicas):
    door = door_of()
    replicas.deaths = [0, 1, 0]
    refused(post(door), 500, "has died; ask again")
    assert len(replicas.asked) == 3


def test_refusals_are_those_of_one_process_and_keys_stay_at_the_door(door_of, replicas, tmp_path):
    file = tmp_path / "keys"
    file.touch(0o600)
    file.write_text(KEY)
    door = door_of(ApiKeys(file))
    refused(post(door), 401, "missing or wrong")
    refused(post(door, host="evil.example"), 401, "missing or wrong")
    refused(post(door_of(), host="evil.example"), 403, "Host or Origin")
    assert not replicas.asked
    signed = {"authorization": f"Bearer {KEY}", "host": "clinic.example"}
    assert post(door, **signed).status_code == 200
    assert KEY not in str(replicas.asked)
    assert "clinic.example" not in str(replicas.asked)
    refused(post(door, b"{", **signed), 400, "no JSON")
    refused(post(door, {**ASKED, "model": "none"}, **signed), 404, "no such model")
    refused(post(door, b" " * (2**20 + 1), **signed), 413, "send less")
    refused(post(door_of(ApiKeys(file), most=0), **signed), 429, "too many requests")
    slow = {**ASKED, "max_tokens": CONTEXT - 20}
    refused(post(door_of(ApiKeys(file), timeout_s=0.001), slow, **signed), 504, "took too long")


def test_what_never_changes_is_asked_once_and_waits_for_no_slot(door_of, replicas):
    door = door_of(most=0)
    for path in ("/", "/docs", "/openapi.json", "/v1/models", "/v1/models/model"):
        first, again = ask(door, ("GET", path, {}))[0], ask(door, ("GET", path, {}))[0]
        assert first.status_code == again.status_code == 200
        assert first.content == again.content
        assert first.headers == again.headers
    assert len(replicas.asked) == 5


def test_metrics_have_each_replicas_figures_under_its_name_and_requests_once(door_of, replicas):
    door = door_of()
    assert post(door).status_code == 200
    page = replicas._replica._service.metrics.page()
    lines = door.metrics.page({"a": page, "b": page}).decode().splitlines()
    assert 'siloweave_requests_total{path="/v1/completions",status="200"} 1.0' in lines
    written = [line for line in lines if line.startswith('siloweave_tokens_total{kind="completion"')]
    assert [line.split("replica=")[1][:3] for line in written] == ['"a"', '"b"']
    assert not [line for line in lines if line.startswith("siloweave_requests_total") and "replica" in line]
    assert "siloweave_replicas 2.0" in lines


def test_a_replica_whose_command_was_killed_ends_its_application(replicas, monkeypatch):
    replica, ended = replicas._replica, queue.Queue()
    replica._office = replica._application = "siloweave-1"
    monkeypatch.setattr("ray.serve.delete", lambda name, **_: ended.put(name))
    monkeypatch.setattr("ray.get_actor", lambda *_, **__: object())
    replica.check_health()
    assert ended.empty()

    def gone(*_, **__):
        raise ValueError

    monkeypatch.setattr("ray.get_actor", gone)
    replica.check_health()
    assert ended.get(timeout=300) == "siloweave-1"
    replica._service.close()
    with pytest.raises(SiloweaveError, match="decodes no more"):
        replica.check_health()
