"""How many ranks the cluster has room for, and the placement group that holds them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cluster.runtime.places import Places
from configs.errors import InputError
from configs.events import Listener
from configs.schema.schema import RunConfig

_LOOK_S = 0.5
_SETTLE_S = 5.0  # a node that died may count as alive for a moment, and what a gang held as taken


def pick_device(config: RunConfig, gpus: float) -> str:
    """``cuda`` where it is asked for, or where the fewest ranks could each have one of the GPUs; else ``cpu``.

    Asked once per run: a gang that loses a node's GPUs waits for others, and does not continue on CPUs.
    """
    if config.cluster.device == "auto":
        return "cuda" if gpus >= config.world_sizes[-1] else "cpu"
    return "cuda" if config.cluster.device == "gpu" else "cpu"


@contextmanager
def placed(config: RunConfig, device: str, report: Listener, *, patient: bool) -> Iterator[Places]:
    """Places for as many ranks as there is room for; all of them are gone at the end, however it comes.

    Args:
        config: the run's settings.
        device: ``cpu`` or ``cuda``.
        report: told when there is something to wait for.
        patient: wait for the largest gang before a smaller one is taken.

    Raises:
        InputError: the cluster can't place the smallest gang.
    """
    from ray.util.placement_group import remove_placement_group

    group, size = _place(config, bundle_of(config, device), report, patient=patient)
    places = Places(config, group, size, device, report)
    try:
        yield places
    finally:
        places.kill()
        remove_placement_group(group)


def could_grow(config: RunConfig, places: Places) -> bool:
    """Whether a gang of more ranks than this one would find room now."""
    import ray

    size, bundle = len(places.ranks), bundle_of(config, places.device)
    larger = [n for n in config.world_sizes if size < n <= room(bundle)]
    if not larger:
        return False
    free = ray.available_resources()
    return all(free.get(name, 0.0) >= (larger[-1] - size) * amount for name, amount in bundle.items())


def bundle_of(config: RunConfig, device: str) -> dict[str, int]:
    """What a place reserves."""
    return {"CPU": config.cluster.threads_per_rank, **({"GPU": 1} if device == "cuda" else {})}


def room(bundle: dict[str, int]) -> int:
    """Ranks that the living nodes have room for, were nothing else running there."""
    import ray

    living = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(node.get(name, 0) // amount) for name, amount in bundle.items()) for node in living)


def _place(config: RunConfig, bundle: dict[str, int], report: Listener, *, patient: bool) -> tuple[Any, int]:
    """The placement group, and its number of ranks."""
    from ray.util.placement_group import placement_group, remove_placement_group

    deadline = time.monotonic() + config.cluster.placement_timeout_s
    fitting = await_room(config, bundle, deadline, report, patient=patient)
    for size in fitting:
        last = size == fitting[-1] or (patient and size == fitting[0])
        group = placement_group([bundle] * size, strategy="PACK")
        if group.wait(timeout_seconds=max(_SETTLE_S, deadline - time.monotonic()) if last else _SETTLE_S):
            return group, size
        remove_placement_group(group)
    raise InputError(_not_placed(config, bundle))


def await_room(
    config: RunConfig, bundle: dict[str, int], deadline: float, report: Listener, *, patient: bool
) -> list[int]:
    """The sizes that the living nodes have room for, largest first.

    Raises:
        InputError: there is none, and none came in time.
    """
    said = False
    while True:
        fitting = [size for size in config.world_sizes if size <= room(bundle)]
        if fitting and (fitting[0] == config.world_sizes[0] or not patient):
            return fitting
        if time.monotonic() > deadline:
            break
        if not said:
            timeout_s = config.cluster.placement_timeout_s
            then = f"then going on with {fitting[0]}" if fitting else "then giving up"
            message = f"{_lack(config, bundle)}; waiting up to {timeout_s:g} s for nodes, {then}"
            report({"event": "waiting", "message": message})
            said = True
        time.sleep(_LOOK_S)
    if fitting:
        return fitting
    lower = "cluster.min_world_size" if config.cluster.min_world_size else "cluster.world_size"
    raise InputError(f"{_lack(config, bundle)}; lower {lower} or cluster.threads_per_rank, or join a larger cluster")


def _lack(config: RunConfig, bundle: dict[str, int]) -> str:
    """What the gang needs and what there is."""
    import ray

    there, size = ray.cluster_resources(), config.cluster.world_size
    for name, amount in bundle.items():
        needed, has = size * amount, there.get(name, 0)
        if needed > has:
            return f"cluster.world_size {size}: the gang needs {needed:g} {name}, the Ray cluster has {has:g}"
    return f"cluster.world_size {size}: the Ray cluster's nodes have room for {room(bundle)} times {bundle}"


def _not_placed(config: RunConfig, bundle: dict[str, int]) -> str:
    import ray

    free = {name: ray.available_resources().get(name, 0.0) for name in ("CPU", "GPU")}
    return (
        f"cluster.world_size {config.cluster.world_size}: Ray did not place {bundle} per rank within "
        f"{config.cluster.placement_timeout_s:g} s (free: {free}); wait for other jobs, or lower cluster.world_size"
    )
