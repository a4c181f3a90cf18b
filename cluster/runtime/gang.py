"""The gang: one Ray actor per rank, watched by the driver; a rank that fails means a restart from the last commit."""

from pathlib import Path

from cluster.runtime.placement import could_grow, pick_device, placed
from cluster.runtime.places import PlaceLost, Places, ranks_of
from cluster.runtime.watch import RankFailed, Watch
from configs.errors import SiloweaveError
from configs.events import Listener
from configs.schema.schema import RunConfig
from trainer.pretraining.rollback import RollBack


def run_gang(config: RunConfig, run_directory: Path, report: Listener) -> None:
    """Pretrains on a gang of ranks until the last step is committed.

    Every start takes as many ranks as there is room for, from ``cluster.world_size`` down to ``min_world_size``.

    Args:
        config: the run's settings.
        run_directory: shared by all ranks.
        report: receives every event of rank 0, and ``gang``, ``standby`` and ``restart`` events of our own.

    Raises:
        InputError: the cluster can't place the gang.
        SiloweaveError: more than ``cluster.max_failures`` failures; the message is the first cause.
    """
    import ray

    causes: list[str] = []
    skipped: list[tuple[int, int]] = []
    device = pick_device(config, ray.cluster_resources().get("GPU", 0))
    while not _train_in_places(config, run_directory, device, report, causes, skipped):
        pass


def _train_in_places(
    config: RunConfig,
    run_directory: Path,
    device: str,
    report: Listener,
    causes: list[str],
    skipped: list[tuple[int, int]],
) -> bool:
    """Trains in one placement group, through failures. False where another group is needed, or a larger one fits."""
    with placed(config, device, report, patient=not causes) as places:
        taken_over = False
        while True:
            try:
                _train_once(places, config, run_directory, report, skipped)
                return True
            except RollBack as back:  # no failure: the ranks count these, over all restarts of the run
                skipped.append(back.skip)
                report({"event": "rollback", "step": back.step, "cause": str(back), "skipped_batches": back.skip})
            except RankFailed as failure:
                _count(causes, str(failure), config.cluster.max_failures, report)
            except PlaceLost as lost:
                if not taken_over:  # else the standby died of what the rank died of, which is counted
                    _count(causes, str(lost), config.cluster.max_failures, report)
                return False
            if could_grow(config, places):
                return False
            places.take_over()
            taken_over = True


def _count(causes: list[str], cause: str, max_failures: int, report: Listener) -> None:
    causes.append(cause)
    if len(causes) == 1 > max_failures:
        raise SiloweaveError(cause)
    if len(causes) > max_failures:
        raise SiloweaveError(f"{causes[0]}; {len(causes)} failures, and cluster.max_failures is {max_failures}")
    report({"event": "restart", "attempt": len(causes), "cause": cause})


def _train_once(
    places: Places, config: RunConfig, run_directory: Path, report: Listener, skipped: list[tuple[int, int]]
) -> None:
    endpoints = places.endpoints()
    report({"event": "gang", "world_size": len(endpoints), "pids": [endpoint.pid for endpoint in endpoints]})
    ranks = ranks_of(endpoints, places.device, config.cluster.threads_per_rank)
    runs = [
        handle.train.remote(config, run_directory, rank, skipped)
        for handle, rank in zip(places.ranks, ranks, strict=True)
    ]
    Watch(places, runs, config.cluster.hang_timeout_s, report).until_done()
