"""Starts a Ray of our own: on this machine alone, for those who have its token, without processes that nobody uses."""

import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any

from trainer.pretraining.startup import replaced

QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


@contextmanager
def own_token() -> Iterator[None]:
    """Inside, a Ray that is started takes code from this process and those that inherit its environment alone.

    Ray runs what it is sent, and by itself asks nobody who they are: any user of this machine could send something.
    Who has set RAY_AUTH_MODE has decided that, and finds it as it was set.
    """
    if "RAY_AUTH_MODE" in os.environ:
        yield
        return
    try:
        with environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}):
            _read_again()
            yield
    finally:
        _read_again()


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Inside, the environment has these values, too."""
    before = {name: os.environ[name] for name in values if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            os.environ.pop(name, None)
        os.environ.update(before)


def _read_again() -> None:
    """Ray has read the environment at its import."""
    import ray._raylet

    raylet: Any = ray._raylet
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def start(cpus: int) -> None:
    """Starts a Ray whose ports no other machine reaches, and connects to it.

    Args:
        cpus: that its actors share.

    Raises:
        RuntimeError: this version of Ray would listen on other addresses, too.
    """
    import ray
    from ray._private import ray_constants

    # By itself Ray takes an address that other machines reach. This constant is false on macOS, where it takes
    # 127.0.0.1, and all that it starts then listens there alone.
    with _only_what_is_used(), replaced(ray_constants, "ENABLE_RAY_CLUSTER", False):
        # `address="local"`: never join another Ray of this machine by accident.
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=256 * 2**20, **QUIET)
    if not ip_address(place := ray.util.get_node_ip_address()).is_loopback:
        raise RuntimeError(f"Ray {ray.__version__} listens at {place}, where other machines may reach it")


@contextmanager
def _only_what_is_used() -> Iterator[None]:
    """Leaves out processes that an embedded Ray starts and nothing here uses: they take a second or two of every start.

    They are the dashboard's server, for which ``ray.init`` waits even where ``include_dashboard`` is false, and the
    monitors of autoscaling and of logs. Ray has no setting for it; a version that this was not tried with starts
    all of them.
    """
    import ray
    import ray._private.node
    from ray._private import services

    if not ray.__version__.startswith("2.55."):
        yield
        return
    node: Any = ray._private.node.Node
    with (
        replaced(services, "start_api_server", lambda *_, **__: (None, None)),
        replaced(node, "start_monitor", lambda _: None),
        replaced(node, "start_log_monitor", lambda _: None),
    ):
        yield
