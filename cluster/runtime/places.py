"""The gang's places: one bundle of a placement group each, which holds a rank and its warm standby."""

import time
from typing import Any

from cluster.runtime.rank_actor import Endpoint, RankActor
from configs.errors import lines_of
from configs.events import Listener
from configs.schema.schema import RunConfig
from trainer.rank import Rank

_THREADS = 4  # train or stand_by, listen, and two short calls
_LOOK_S = 0.5


class PlaceLost(Exception):
    """A rank's process can't be reached, or can't be started: its node may be gone."""


class Places:
    """Ranks and standbys of one placement group.

    A standby is a process that has imported everything and waits. ``take_over`` puts the standbys in the ranks'
    places: a restart always begins with fresh processes.

    Attributes:
        ranks: handles of the ranks, by rank.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, config: RunConfig, group: Any, size: int, device: str, report: Listener) -> None:
        self._config, self._group, self.device, self._report = config, group, device, report
        self._standbys: dict[int, Any] = {}  # None: it could not be warmed
        self._warming: dict[Any, int] = {}
        self._waiting: dict[Any, int] = {}
        self.ranks: list[Any] = [self._actor(index) for index in range(size)]
        self._nodes: set[str] = set()  # where they ran last

    def _actor(self, index: int) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        # The bundle reserves the CPUs; a rank and its standby share them, and the GPU.
        gpus = 0.0 if self.device == "cpu" else 0.5 if self._config.cluster.standbys else 1.0
        actor: Any = ray.remote(RankActor)
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        return actor.options(
            num_cpus=0, num_gpus=gpus, scheduling_strategy=strategy, max_concurrency=_THREADS, max_restarts=0
        ).remote()

    def endpoints(self) -> list[Endpoint]:
        """Where the ranks run, once their processes answer.

        Raises:
            PlaceLost: one of them doesn't.
        """
        import ray

        timeout_s = self._config.cluster.placement_timeout_s
        deadline = time.monotonic() + timeout_s
        asked = [rank.endpoint.remote() for rank in self.ranks]
        while True:
            answered, missing = ray.wait(asked, num_returns=len(asked), timeout=_LOOK_S)
            try:
                ray.get(answered)
            except ray.exceptions.RayActorError as error:
                raise PlaceLost(f"a rank's process died before it started ({lines_of(error)[0]})") from error
            if not missing:
                found: list[Endpoint] = ray.get(asked)
                self._nodes = {endpoint.node for endpoint in found}
                return found
            if self._nodes - {node["NodeID"] for node in ray.nodes() if node["Alive"]}:
                raise PlaceLost("a node is gone that ranks ran on")
            if time.monotonic() > deadline:
                raise PlaceLost(f"a rank's process did not start within {timeout_s:g} s (cluster.placement_timeout_s)")

    def add_standbys(self) -> None:
        """Starts the missing standbys; they get ready while training goes on."""
        if not self._config.cluster.standbys:
            return
        for index in range(len(self.ranks)):
            if index not in self._standbys:
                standby: Any = self._actor(index)
                self._standbys[index] = standby
                self._warming[standby.warm.remote(self._config, self.device)] = index

    @property
    def waits(self) -> list[Any]:
        """References that become ready when a standby is warm, or dead."""
        return [*self._warming, *self._waiting]

    def standby_changed(self, reference: Any) -> None:
        """Takes note of a standby that is warm now, or died."""
        import ray

        if reference in self._waiting:
            index = self._waiting.pop(reference)
            self._report({"event": "standby_died", "rank": index})
            del self._standbys[index]
            self.add_standbys()
            return
        index = self._warming.pop(reference)
        try:
            pid = ray.get(reference)
        except ray.exceptions.RayError as error:
            # Another one would fail, too, so there is none until the next restart.
            self._standbys[index] = None
            self._report({"event": "standby_died", "rank": index, "cause": lines_of(error)[0]})
            return
        standby: Any = self._standbys[index]
        self._waiting[standby.stand_by.remote()] = index
        self._report({"event": "standby", "rank": index, "pid": pid})

    def take_over(self) -> None:
        """Kills the ranks and puts their standbys, or new processes where there is none, in their places."""
        import ray

        for rank in self.ranks:
            ray.kill(rank, no_restart=True)
        self.ranks = [self._standbys.get(index) or self._actor(index) for index in range(len(self.ranks))]
        for state in (self._standbys, self._warming, self._waiting):
            state.clear()

    def kill(self) -> None:
        """Ends all processes."""
        import ray

        for handle in filter(None, (*self.ranks, *self._standbys.values())):
            ray.kill(handle, no_restart=True)


def ranks_of(endpoints: list[Endpoint], device: str, threads: int) -> list[Rank]:
    """Every rank's place, with rank 0's port as the rendezvous."""
    nodes = [endpoint.node for endpoint in endpoints]
    return [
        Rank(
            rank=index,
            world_size=len(nodes),
            local_rank=nodes[:index].count(node),
            local_world_size=nodes.count(node),
            master_address=endpoints[0].address,
            master_port=endpoints[0].port,
            device=device,
            threads=threads,
        )
        for index, node in enumerate(nodes)
    ]
