"""What a cluster has room for, as its nodes have it: figures of nodes stand for the nodes."""

from types import SimpleNamespace

import pytest

from cluster.runtime import session
from cluster.runtime.session import refuse_without_room
from configs.errors import InputError


def ray_with(whole, *free):
    """A Ray whose nodes have that many CPUs, and these free ones at each look; the last look stays."""
    looks = list(free)

    def per_node():
        now = looks.pop(0) if len(looks) > 1 else looks[0]
        return {str(number): {"CPU": float(cpus)} if cpus else {} for number, cpus in enumerate(now)}

    nodes = [{"Alive": True, "Resources": {"CPU": float(cpus)}} for cpus in whole]
    nodes.append({"Alive": False, "Resources": {"CPU": 1000.0}})
    state = SimpleNamespace(available_resources_per_node=per_node)
    return SimpleNamespace(nodes=lambda: nodes, _private=SimpleNamespace(state=state)), looks


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(session, "_LOOK_S", 0.0)


def test_what_fits_is_counted_on_each_node_and_not_over_all_of_them():
    ray, _ = ray_with([3, 3], [3, 3])  # six CPUs, and no room for two times two and another two
    refuse_without_room(ray, "--replicas", 2, 2)
    with pytest.raises(InputError, match=r"they need 6 CPUs, 2 on a node for each, .* room for 2 of them now; give"):
        refuse_without_room(ray, "--replicas", 3, 2)


def test_what_has_just_ended_gives_its_cpus_back_after_a_while():
    ray, looks = ray_with([2, 2], [0, 0], [1, 0], [2, 0], [2, 2])
    refuse_without_room(ray, "--workers", 4, 1)
    assert looks == [[2, 2]]


def test_a_cluster_that_stays_full_is_waited_for_no_longer(monkeypatch):
    monkeypatch.setattr(session, "_ROOM_S", 0.05)
    with pytest.raises(InputError, match="room for 1 of them now"):
        refuse_without_room(ray_with([2, 2], [1, 0])[0], "--workers", 2, 1)
