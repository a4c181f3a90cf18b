"""The gang: one Ray actor a rank, watched by the driver; a dead rank means a restart from the last commit."""

import socket
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.errors import InputError, SiloweaveError
from configs.schema import ClusterSettings, RunConfig
from trainer.pretrain import Report
from trainer.zero import Rank

POLL_S = 0.2


class RankActor:
    """One rank. ``train`` runs in one of the actor's two threads; ``drain`` answers in the other."""

    def __init__(self) -> None:
        self._events: deque[dict[str, Any]] = deque()

    def endpoint(self) -> tuple[str, str, int]:
        """(node id, address, a free port) of this rank's process."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), probe.getsockname()[1]

    def train(self, config: RunConfig, run_directory: Path, rank: Rank) -> None:
        """Trains this rank's share to the end."""
        from trainer.zero import prepare_process

        prepare_process(rank)
        from trainer.pretrain import pretrain

        pretrain(config, run_directory, rank, self._events.append)

    def drain(self) -> list[dict[str, Any]]:
        """Events since the last call (rank 0 has them)."""
        return [self._events.popleft() for _ in range(len(self._events))]


def run_gang(config: RunConfig, run_directory: Path, report: Report) -> None:
    """Pretrains on a gang of ranks until the last step is committed.

    Args:
        config: the run's settings.
        run_directory: shared by all ranks.
        report: receives every event of rank 0, and ``restart`` events of our own.

    Raises:
        InputError: the cluster can't place the gang.
        SiloweaveError: more than ``cluster.max_failures`` failures; the message is the first cause.
    """
    first_cause: SiloweaveError | None = None
    for attempt in range(config.cluster.max_failures + 1):
        try:
            with _placed(config.cluster) as (actors, device):
                _train_once(actors, device, config, run_directory, report)
            return
        except _RankFailed as failure:
            first_cause = first_cause or SiloweaveError(str(failure))
            report({"event": "restart", "attempt": attempt + 1, "cause": str(failure)})
    raise first_cause or SiloweaveError("the gang ended without training")


class _RankFailed(Exception):
    """A rank raised or its process died."""


@contextmanager
def _placed(settings: ClusterSettings) -> Iterator[tuple[list[Any], str]]:
    """The ranks' actors in one placement group; both are gone at the end, however it comes."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    device = pick_device(settings, ray.cluster_resources())
    bundle = {"CPU": settings.threads_per_rank, **({"GPU": 1} if device == "cuda" else {})}
    _check_resources(settings, bundle, ray.cluster_resources())
    group = placement_group([bundle] * settings.world_size, strategy="PACK")
    actors: list[Any] = []
    try:
        if not group.wait(timeout_seconds=settings.placement_timeout_s):
            raise InputError(
                f"cluster.world_size {settings.world_size}: Ray did not place {bundle} a rank within "
                f"{settings.placement_timeout_s:g} s (free: {_counts(ray.available_resources())}); wait for other "
                "jobs, or lower cluster.world_size"
            )
        actor: Any = ray.remote(RankActor)
        options = {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0), "max_concurrency": 2, "max_restarts": 0}
        for index in range(settings.world_size):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            actors.append(actor.options(scheduling_strategy=strategy, **options).remote())
        yield actors, device
    finally:
        for handle in actors:
            ray.kill(handle, no_restart=True)
        remove_placement_group(group)


def pick_device(settings: ClusterSettings, resources: dict[str, float]) -> str:
    """``cuda`` where it is asked for, or where every rank can have a GPU; else ``cpu``."""
    if settings.device == "auto":
        return "cuda" if resources.get("GPU", 0) >= settings.world_size else "cpu"
    return "cuda" if settings.device == "gpu" else "cpu"


def _check_resources(settings: ClusterSettings, bundle: dict[str, int], resources: dict[str, float]) -> None:
    for name, amount in bundle.items():
        needed, there = amount * settings.world_size, resources.get(name, 0)
        if needed > there:
            raise InputError(
                f"cluster.world_size {settings.world_size}: the gang needs {needed:g} {name}, the Ray cluster has "
                f"{there:g}; lower cluster.world_size or cluster.threads_per_rank, or join a larger cluster"
            )


def _counts(resources: dict[str, float]) -> dict[str, float]:
    return {name: resources.get(name, 0.0) for name in ("CPU", "GPU")}


def _train_once(actors: list[Any], device: str, config: RunConfig, run_directory: Path, report: Report) -> None:
    import ray

    try:
        ranks = _ranks(ray.get([actor.endpoint.remote() for actor in actors]), device, config.cluster.threads_per_rank)
        waiting = [actor.train.remote(config, run_directory, rank) for actor, rank in zip(actors, ranks, strict=True)]
        while waiting:
            done, waiting = ray.wait(waiting, timeout=POLL_S)
            for event in ray.get(actors[0].drain.remote()):
                report(event)
            ray.get(done)  # raises what the rank raised
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, SiloweaveError):
            raise cause from None
        raise _RankFailed(
            f"a rank raised {type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"
        ) from error
    except ray.exceptions.RayActorError as error:
        raise _RankFailed(f"a rank's process died ({str(error).splitlines()[0]})") from error


def _ranks(endpoints: list[tuple[str, str, int]], device: str, threads: int) -> list[Rank]:
    nodes = [node for node, _, _ in endpoints]
    _, address, port = endpoints[0]
    return [
        Rank(
            rank=index,
            world_size=len(nodes),
            local_rank=nodes[:index].count(node),
            local_world_size=nodes.count(node),
            master_address=address,
            master_port=port,
            device=device,
            threads=threads,
        )
        for index, node in enumerate(nodes)
    ]
