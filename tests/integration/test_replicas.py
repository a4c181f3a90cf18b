"""`siloweave serve --replicas`: two processes on a real Ray, of which one is killed while both answer."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import pytest
from served_models import a_federation, a_model
from service_client import SECRET
from service_process import WAIT_S, client, idle, serving

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
            assert "has died" in error.message
            return text, False
        return text, True

    def health(self):
        return httpx.get(f"{self.url}/health", timeout=WAIT_S).json()

    def wait_for(self, whether):
        while not whether(found := self.health()):
            pass
        return found

    def leave(self):
        events = self._client.completions.create(stream=True, **self.asked(3))
        next(iter(events))
        events.close()


def all_there(found):
    return len(found["replicas"]) == 2 and all(one["ready"] for one in found["replicas"].values())


def test_one_of_two_replicas_is_killed_under_load_and_nothing_is_lost_that_had_not_begun(base, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run = a_federation(tmp_path / "clinic", base, 1)
    options = ("--replicas", 2, "--slots", SLOTS)
    with serving(base, run, *options) as (process, said), ThreadPoolExecutor(16) as clients:
        url, asking = said["url"], Asking(said["url"])
        assert [one.id for one in client(url).models.list()] == ["ship", "clinic"]
        found = asking.health()
        assert (found["status"], found["replicas_wanted"], all_there(found)) == ("ok", 2, True)
        expected = [asking.whole(number) for number in range(2)]
        assert asking.streamed(0) == (expected[0], True)
        # Four have slots, two in each replica, and eight wait at the door.
        streams = [clients.submit(asking.streamed, 0) for _ in range(4)]
        wholes = [clients.submit(asking.whole, 1) for _ in range(8)]
        asking.wait_for(lambda found: all(one["running"] for one in found["replicas"].values()) and found["waiting"])
        killed, other = the_replicas(process)
        os.kill(killed.pid, signal.SIGKILL)
        assert [one.result(timeout=WAIT_S) for one in wholes] == [expected[1]] * 8  # whether their replica died or not
        told = [one.result(timeout=WAIT_S) for one in streams]
        assert all(text == expected[0] if ended else text and expected[0].startswith(text) for text, ended in told)
        cut = sum(not ended for _, ended in told)
        moved = sum(figures(url, "siloweave_requests_moved_total").values())
        assert moved + cut > 0
        asking.wait_for(all_there)  # Ray Serve has started another
        assert len(the_replicas(process)) == 2
        assert figures(url, "siloweave_replicas") == {"": 2.0}
        waiting = figures(url, "siloweave_requests_waiting")
        assert sorted(labels[:9] for labels in waiting) == ["{replica="] * 2
        asking.leave()
        idle(url)  # a client that has gone frees its slot in the replica
        last = clients.submit(asking.whole, 1)
        asking.wait_for(lambda found: found["running"])
        process.send_signal(signal.SIGTERM)
        assert last.result(timeout=WAIT_S) == expected[1]
        _, errors = process.communicate(timeout=WAIT_S)
        assert (process.returncode, errors.splitlines()[-1]) == (0, "serve: stopped")
        assert SECRET not in errors
        assert ended(other)


def test_replicas_that_can_not_be_are_refused_in_one_line(siloweave, base, tmp_path, shared_ray):
    address = shared_ray.get_runtime_context().gcs_address
    found = siloweave("serve", str(base), "--replicas", "1000", "--port", "0", cwd=tmp_path, RAY_ADDRESS=address)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: --replicas 1000: they need 1000 CPUs, 1 on a node for each, and the ")
    assert found.stderr.count("\n") == 1
