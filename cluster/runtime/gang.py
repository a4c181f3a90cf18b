"""The gang: one Ray actor a rank, watched by the driver; a rank that fails means a restart from the last commit."""

from pathlib import Path

from cluster.runtime.places import Places, placed, ranks_of
from cluster.runtime.watch import RankFailed, Watch
from configs.errors import SiloweaveError
from configs.schema import RunConfig
from trainer.pretrain import Report


def run_gang(config: RunConfig, run_directory: Path, report: Report) -> None:
    """Pretrains on a gang of ranks until the last step is committed.

    Args:
        config: the run's settings.
        run_directory: shared by all ranks.
        report: receives every event of rank 0, and ``gang``, ``standby`` and ``restart`` events of our own.

    Raises:
        InputError: the cluster can't place the gang.
        SiloweaveError: more than ``cluster.max_failures`` failures; the message is the first cause.
    """
    causes: list[str] = []
    while True:
        with placed(config, report) as places:
            while True:
                try:
                    _train_once(places, config, run_directory, report)
                    return
                except RankFailed as failure:
                    causes.append(str(failure))
                if len(causes) > config.cluster.max_failures:
                    raise SiloweaveError(_summary(causes))
                report({"event": "restart", "attempt": len(causes), "cause": causes[-1]})
                if places.lost_a_node():
                    break
                places.take_over()


def _summary(causes: list[str]) -> str:
    if len(causes) == 1:
        return causes[0]
    return f"{causes[0]}; {len(causes)} failures in all, more than cluster.max_failures allows"


def _train_once(places: Places, config: RunConfig, run_directory: Path, report: Report) -> None:
    import ray

    try:
        endpoints = ray.get([handle.endpoint.remote() for handle in places.ranks])
    except ray.exceptions.RayActorError as error:
        raise RankFailed(f"a rank's process died before it started ({str(error).splitlines()[0]})") from error
    report({"event": "gang", "pids": [endpoint.pid for endpoint in endpoints]})
    ranks = ranks_of(endpoints, places.device, config.cluster.threads_per_rank)
    runs = [
        handle.train.remote(config, run_directory, rank) for handle, rank in zip(places.ranks, ranks, strict=True)
    ]
    Watch(places, runs, config.cluster.hang_timeout_s, report).until_done()
