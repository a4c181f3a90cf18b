"""Where the office is placed, and whose Ray Serve is ended. Ray itself stands aside: one node can't tell."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from cluster.serving.replicas import running
from cluster.serving.replicas.offer import Offer


class Ray:
    """What is asked of Ray here: a node, an actor's options, and whether Ray Serve's controller is there."""

    def __init__(self, serves):
        self.serves, self.options_of_office = serves, {}

    def get_runtime_context(self):
        return SimpleNamespace(get_node_id=lambda: "a" * 56)

    def get_actor(self, name, namespace):
        if not self.serves:
            raise ValueError(name)
        return object()

    def remote(self, _):
        return SimpleNamespace(options=self.options)

    def options(self, **given):
        self.options_of_office = given
        return SimpleNamespace(remote=lambda: "office")


@pytest.mark.parametrize(
    ("address", "serves", "others", "ended"),
    [
        ("10.0.0.1:6379", False, {}, True),
        ("10.0.0.1:6379", True, {}, False),  # it was there before the command
        ("10.0.0.1:6379", False, {"others": "app"}, False),
        ("", False, {}, False),  # with our own Ray all of it ends
    ],
)
def test_the_office_stays_here_and_others_keep_their_serve(address, serves, others, ended, monkeypatch):
    ray, said = Ray(serves), []

    @contextmanager
    def session(*_):
        yield ray

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(running, "ray_session", session)
    monkeypatch.setattr(running, "refuse_without_room", lambda *_: None)
    monkeypatch.setattr(running, "_run", lambda *_: "handle")
    monkeypatch.setattr("ray.serve.start", lambda **_: setattr(ray, "serves", True))
    monkeypatch.setattr("ray.serve.status", lambda: SimpleNamespace(applications=others))
    for name in ("delete", "shutdown"):
        monkeypatch.setattr(f"ray.serve.{name}", lambda *_, name=name: said.append(name))
    with running.replicas(Offer(("model",), 2, 60.0, None, ""), 2, 1) as (handle, office):
        assert (handle, office) == ("handle", "office")
    placed = ray.options_of_office["scheduling_strategy"]
    assert (placed.node_id, placed.soft) == ("a" * 56, False)
    assert said == ["delete", *["shutdown"] * ended]
