"""What the door does when a replica dies at each point of an answer. The replicas are real, with no Ray between."""

import asyncio
import json
import math
import queue
from functools import partial

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from served_models import CONTEXT, a_model
from service_client import SECRET, ask, refused

from cluster.serving.app import Service
from cluster.serving.errors import ApiError
from cluster.serving.keys import ApiKeys
from cluster.serving.models import find, load
from cluster.serving.replicas import door as door_module
from cluster.serving.replicas import reports as reports_module
from cluster.serving.replicas.door import Door
from cluster.serving.replicas.replica import Replica, Report
from cluster.serving.replicas.reports import Reports
from cluster.serving.replicas.shared import Shared
from configs.errors import SiloweaveError
from trainer.inference.batching import Engine, EngineLimits

KEY = "key-of-the-clinic-0001"
ASKED = {"model": "model", "prompt": f"the {SECRET}", "max_tokens": 20, "temperature": 0}


class Stream:
    """A replica's answer, of which only so many messages come before its process dies."""

    def __init__(self, messages, left, how):
        self._messages, self._left, self._how = messages, left, how

    def __aiter__(self):
        return self._until_death()

    async def _until_death(self):
        try:
            async for message in self._messages:
                if self._left == 0:
                    raise self._how
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
        self.deaths, self.asked, self.how = [], [], ActorDiedError()

    def options(self, **_):
        return self

    def remote(self, scope, body):
        self.asked.append((scope, body))
        return Stream(self._replica.asgi(scope, body), self.deaths.pop(0) if self.deaths else -1, self.how)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return load([find(str(a_model(tmp_path_factory.mktemp("models") / "model")), None)], None)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(door_module, "_PAUSE_S", 0.0)


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


def test_a_replica_that_can_not_be_reached_has_not_died(door_of, replicas, monkeypatch):
    monkeypatch.setattr(door_module, "_PAUSE_S", 0.0)
    door = door_of(timeout_s=3600.0)
    replicas.how = ActorUnavailableError("no connection", None)
    replicas.deaths = [0] * 7
    assert post(door).status_code == 200
    replicas.deaths = [0] * 8
    refused(post(door), 500, "can't be reached")
    assert moved(door) == 14


def test_who_reads_nothing_of_a_cut_stream_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(door_module, "SLOW_S", 0.01)

    async def cut():
        sent = asyncio.Queue(maxsize=2)
        answer = door_module._Sent(sent.put)
        head = [(b"content-type", b"text/event-stream")]
        await answer.add({"type": "http.response.start", "status": 200, "headers": head})
        await answer.add({"type": "http.response.body", "body": b"data: {}", "more_body": True})
        await answer.end(ApiError(504, "slow", "timeout"))  # the third has no room
        return sent.qsize()

    assert asyncio.run(asyncio.wait_for(cut(), 300)) == 2


def test_what_is_open_is_read_alone_and_takes_no_slot(door_of, replicas, tmp_path):
    file = tmp_path / "keys"
    file.touch(0o600)
    file.write_text(KEY)
    signed = {"headers": {"authorization": f"Bearer {KEY}"}}
    door = door_of(ApiKeys(file))
    for path in ("/", "/health"):
        for method in ("POST", "PUT", "DELETE"):
            refused(*ask(door, (method, path, {})), 401, "missing or wrong")
            refused(*ask(door, (method, path, signed)), 405, "no such method")
        assert ask(door, ("HEAD", path, {}))[0].status_code == 405
    assert not replicas.asked


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


def test_a_page_is_fetched_once_for_all_who_ask_and_again_if_its_replica_dies(door_of, replicas):
    door = door_of(most=0)
    replicas.deaths = [0, 1]
    pages = ask(door, *(("GET", "/", {}),) * 5)
    assert [page.status_code for page in pages] == [200] * 5
    assert len(replicas.asked) == 3
    replicas.deaths = [0, 0, 0]
    refused(*ask(door, ("GET", "/docs", {})), 500, "has died")
    assert ask(door, ("GET", "/docs", {}))[0].status_code == 200


def test_a_page_whose_replica_hangs_is_given_up(door_of, replicas, monkeypatch):
    async def hangs(*_):
        await asyncio.Event().wait()
        yield

    monkeypatch.setattr(replicas._replica, "asgi", hangs)
    door = door_of(timeout_s=0.01)
    refused(*ask(door, ("GET", "/", {})), 504, "took too long")
    monkeypatch.undo()
    door._timeout_s = 300.0
    assert ask(door, ("GET", "/", {}))[0].status_code == 200


class Actor:
    """Stands for an actor of Ray: what its calls give is there at once, never, or an error."""

    def __init__(self, said):
        self.said, self.calls, self.left = said, 0, []
        self.known = self.__ray_call__ = self.leave = self

    def remote(self, *arguments):
        if arguments and isinstance(arguments[0], str):
            self.left.append(arguments[0])
            return None
        self.calls += 1
        return self._said()

    async def _said(self):
        if self.said is None:
            await asyncio.Event().wait()
        if isinstance(self.said, Exception):
            raise self.said
        return self.said


def test_replicas_are_asked_once_for_all_who_ask_the_door(monkeypatch):
    well = Actor(Report(True, 0, 2, b""))
    office = Actor({"a": well})

    async def looks():
        reports = Reports(office, lambda: 1)
        seen = await asyncio.gather(*(reports.seen() for _ in range(20)))
        assert {(one.running, one.waiting) for one in seen} == {(2, 0)}  # and not -1
        await reports.seen()
        assert (office.calls, well.calls) == (1, 1)
        monkeypatch.setattr(reports._seen, "_holds_s", 0.0)
        await reports.seen()
        assert (office.calls, well.calls) == (2, 2)

    monkeypatch.setattr(reports_module, "HELD_S", 3600.0)
    asyncio.run(looks())


async def asked_long_ago(shared, actor):
    waiting = asyncio.create_task(shared.get())
    while not actor.calls:
        await asyncio.sleep(0)
    shared._begun = -math.inf
    waiting.cancel()


def test_what_hangs_is_asked_once_and_what_can_not_be_reached_stays_known(monkeypatch):
    monkeypatch.setattr(reports_module, "ANSWER_S", 3600.0)
    monkeypatch.setattr(reports_module, "HELD_S", 0.0)
    well, hung = Actor(Report(True, 0, 0, b"")), Actor(None)
    away, dead = Actor(ActorUnavailableError("no connection", None)), Actor(ActorDiedError())
    office = Actor({"well": well, "hung": hung, "away": away, "dead": dead})

    async def looks():
        reports = Reports(office, lambda: 0)
        reports._questions["hung"] = Shared(partial(reports_module._ask, hung), 0.0)
        await asked_long_ago(reports._questions["hung"], hung)
        for _ in range(3):
            assert set((await reports.seen()).replicas) == {"well"}
        assert (hung.calls, well.calls, away.calls, office.left) == (1, 3, 3, ["dead"] * 3)
        office.said, office.calls = None, 0
        await asked_long_ago(reports._knowing, office)
        for _ in range(3):  # those that it knew last
            assert set((await reports.seen()).replicas) == {"well"}
        assert (office.calls, well.calls, hung.calls) == (1, 6, 1)

    asyncio.run(asyncio.wait_for(looks(), 300))


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
