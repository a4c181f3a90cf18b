"""Joins a Ray cluster, or starts one of our own on this machine for as long as it is needed."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import psutil

from cluster.runtime import limits, own_ray
from configs.errors import InputError, lines_of
from configs.schema.pretrain import ClusterSettings

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    # Without this, the agent of an embedded Ray looks at every process every 5 s, for a dashboard that nobody has: that
    # is half of what the agent does.
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # what a rank's peers raise over its death is nothing for the user
    # Messages up to this size (Ray: 100 kB) travel in the call itself. One of 0.2 MB, a small adapter, takes 3 ms of
    # processor time there and back in the call, and 11 ms through the object store.
    "RAY_max_direct_call_object_size": str(2**20),
}
_KILLED_S = 5.0  # until a killed process is gone
_ROOM_S = 30.0
_LOOK_S = 0.2


def unreachable(address: str) -> str | None:
    """Why nothing answers at a Ray address, or None where something does."""
    if address in ("auto", "local"):
        return None
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=5):
            return None
    except (OSError, ValueError) as error:
        return str(error)


@contextmanager
def ray_session(settings: ClusterSettings, processes: int) -> Iterator[Any]:
    """A connected Ray: ``cluster.address``, else RAY_ADDRESS, else an embedded one with the CPUs that are needed.

    Args:
        settings: address and CPUs per process.
        processes: how many actors will run at once.

    Raises:
        InputError: no Ray answers at the address.
    """
    with own_ray.environment({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}):
        import ray

        if ray.is_initialized():  # a stage inside a pipeline that holds the session already
            yield ray
            return
        address = address_of(settings)
        with nullcontext() if address else own_ray.own_token(), _nothing_left():
            with _our_sigterm():
                if address:
                    _join(settings)
                else:
                    limits.refuse_narrow()
                    own_ray.start(processes * settings.threads_per_rank)
            yield ray


def refuse_without_room(ray: Any, option: str, processes: int, cpus: int) -> None:
    """Refuses to start what the cluster has no room for just now, and would wait for without a word.

    What earlier processes had is free again some time after they have ended, so that room is waited for a while
    where the cluster's nodes would have it.

    Args:
        ray: connected.
        option: that said how many.
        processes: how many.
        cpus: of each, on one node.

    Raises:
        InputError: fewer CPUs are free.
    """
    until = time.monotonic() + _ROOM_S
    while (room := _room(ray._private.state.available_resources_per_node().values(), cpus)) < processes:
        whole = _room((node["Resources"] for node in ray.nodes() if node["Alive"]), cpus)
        if whole < processes or time.monotonic() > until:
            raise InputError(
                f"{option} {processes}: they need {processes * cpus} CPUs, {cpus} on a node for each, and the cluster "
                f"has room for {room} of them now; give fewer"
            )
        time.sleep(_LOOK_S)


def _room(nodes: Iterable[Mapping[str, float]], cpus: int) -> int:
    return sum(int(node.get("CPU", 0) // cpus) for node in nodes)


def address_of(settings: ClusterSettings) -> str:
    """Where the Ray to join is; empty for one of our own."""
    return settings.address or os.environ.get("RAY_ADDRESS", "")


def no_ray(settings: ClusterSettings, reason: str) -> InputError:
    """The one line for an address where no Ray answers: where the address comes from, and how to be rid of it."""
    if settings.address:
        return InputError(
            f"cluster.address {settings.address!r}: no Ray answers there ({reason}); start it or unset it"
        )
    return InputError(
        f"RAY_ADDRESS in the environment is {address_of(settings)!r}, and no Ray answers there ({reason}): if that Ray "
        "has ended, `unset RAY_ADDRESS`, and a Ray of our own is started; else start it"
    )


@contextmanager
def _nothing_left() -> Iterator[None]:
    """Ends Ray, also one that is half started, with all that it started.

    A raylet that is ended before it is up says nothing to its agents, and they live on for over a minute.
    """
    import ray

    this = psutil.Process()
    before = set(this.children())
    try:
        yield
    finally:
        started = set(this.children()) - before
        tree = started.union(*(_descendants(process) for process in started))
        ray.shutdown()
        for process in tree:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(tree, timeout=_KILLED_S)


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


@contextmanager
def _our_sigterm() -> Iterator[None]:
    """``ray.init`` puts a handler of its own in, under which a command would end with another status, in silence."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _join(settings: ClusterSettings) -> None:
    import ray

    address = address_of(settings)
    reason = unreachable(address)
    if reason:  # Ray itself would try for minutes
        raise no_ray(settings, reason)
    try:
        ray.init(address=address, **own_ray.QUIET)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise no_ray(settings, lines_of(error)[0]) from error
