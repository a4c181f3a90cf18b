"""`siloweave serve --replicas`: two processes on a real Ray, of which one is killed while both answer."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import psutil
import pytest
from served_models import a_federation, a_model
from service_client import SECRET
from service_process import WAIT_S, client, serving

from cluster.serving.replicas.door import DIED, UNREACHED
from cluster.serving.replicas.reports import HELD_S

TOKENS = 600
SLOTS = 2


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return a_model(tmp_path_factory.mktemp("models") / "ship")


def the_replicas(process):
    """Their processes, below the command's own Ray."""
    return [one for one in psutil.Process(process.pid).children(recursive=True) if "ServeReplica" in _title(one)]


def _title(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def ended(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def figures(url, name):
    """A family's samples: labels as they are written, and values."""
    lines = httpx.get(f"{url}/metrics", timeout=WAIT_S).text.splitlines()
    found = [line.rsplit(" ", 1) for line in lines if line.split("{")[0].split(" ")[0] == name]
    return {labels.removeprefix(name): float(value) for labels, value in found}


def until(whether):
    end = time.monotonic() + WAIT_S
    while not whether():
        assert time.monotonic() < end


class Asking:
    """What clients ask of the service, and what they have got."""

    def __init__(self, url):
        self.url, self._client = url, client(url)

    def asked(self, number, **others):
        return {"model": "ship", "prompt": f"the {SECRET}", "max_tokens": TOKENS, "seed": number, **others}

    def whole(self, number):
        return self._client.completions.create(**self.asked(number)).choices[0].text

    def streamed(self, number):
        """What was written, and whether it came to its end."""
        text = ""
        try:
            for event in self._client.completions.create(stream=True, **self.asked(number)):
                text += event.choices[0].text
        except openai.APIError as error:
            assert error.message in (DIED.message, UNREACHED.message)
            return text, False
        return text, True

    def health(self):
        return httpx.get(f"{self.url}/health", timeout=WAIT_S).json()

    def wait_for(self, whether):
        """Until the door shows it; what it shows first has happened after this was asked for."""
        time.sleep(HELD_S)
        until(lambda: whether(self.health()))

    def begun(self, number):
        """A stream of which the first event has come, and what reads the rest."""
        events = iter(self._client.completions.create(stream=True, **self.asked(number)))
        first = next(events).choices[0].text
        return lambda: first + "".join(event.choices[0].text for event in events)

    def leave(self):
        events = self._client.completions.create(stream=True, **self.asked(3))
        next(iter(events))
        events.close()


@contextmanager
def ending(enough):
    try:
        yield
    finally:
        enough.set()  # also where the test fails, or its clients would ask on


def again(enough, ask, number):
    """Answers until it is enough, one at least."""
    found = [ask(number)]
    while not enough.is_set():
        found.append(ask(number))
    return found


def busy(found):
    slots = [one["running"] for one in found["replicas"].values()]
    return len(slots) == 2 and all(slots) and found["waiting"]


def all_there(found):
    return len(found["replicas"]) == 2 and all(one["ready"] for one in found["replicas"].values())


def test_one_of_two_replicas_is_killed_under_load_and_nothing_is_lost_that_had_not_begun(base, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run = a_federation(tmp_path / "clinic", base, 1)
    options = ("--replicas", 2, "--slots", SLOTS)
    with serving(base, run, *options) as (process, said), ThreadPoolExecutor(16) as clients:
        url, asking = said["url"], Asking(said["url"])
        assert [one.id for one in client(url).models.list()] == ["ship", "clinic"]
        asking.wait_for(all_there)
        found = asking.health()
        assert (found["status"], found["replicas_wanted"]) == ("ok", 2)
        expected = [asking.whole(number) for number in range(2)]
        assert asking.streamed(0) == (expected[0], True)
        # Four have slots, two in each replica, and eight wait at the door: for as long as it takes to see it.
        enough = threading.Event()
        with ending(enough):
            streams = [clients.submit(again, enough, asking.streamed, 0) for _ in range(4)]
            wholes = [clients.submit(again, enough, asking.whole, 1) for _ in range(8)]
            asking.wait_for(busy)
            killed, other = the_replicas(process)
            os.kill(killed.pid, signal.SIGKILL)
        for one in wholes:
            assert set(one.result(timeout=WAIT_S)) == {expected[1]}  # whether their replica died or not
        told = [one for stream in streams for one in stream.result(timeout=WAIT_S)]
        assert all(text == expected[0] if ended else text and expected[0].startswith(text) for text, ended in told)
        cut = sum(not ended for _, ended in told)
        moved = sum(figures(url, "siloweave_requests_moved_total").values())
        assert moved + cut > 0
        asking.wait_for(all_there)  # Ray Serve has started another
        assert len(the_replicas(process)) == 2
        until(lambda: figures(url, "siloweave_replicas") == {"": 2.0})
        until(lambda: [one[:9] for one in figures(url, "siloweave_requests_waiting")] == ["{replica="] * 2)
        asking.leave()
        # A client that has gone frees its slot in the replica.
        asking.wait_for(lambda found: found["running"] == found["waiting"] == 0)
        rests = [asking.begun(number) for number in (0, 1, 0, 1)]
        process.send_signal(signal.SIGTERM)
        assert [rest() for rest in rests] == expected * 2
        _, errors = process.communicate(timeout=WAIT_S)
        assert (process.returncode, errors.splitlines().count("serve: stopped")) == (0, 1)
        assert SECRET not in errors
        assert ended(other)


def test_replicas_that_can_not_be_are_refused_in_one_line(siloweave, base, tmp_path, joined_ray):
    found = siloweave("serve", str(base), "--replicas", "1000", "--port", "0", cwd=tmp_path)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: --replicas 1000: they need 1000 CPUs, 1 on a node for each, and the ")
    assert found.stderr.count("\n") == 1
