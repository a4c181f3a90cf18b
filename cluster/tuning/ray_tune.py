"""Ray Tune over whole runs: each trial is a gang, or a federation, of its own, in a run directory of its own.

Which trials there are is decided before (``cluster/tuning/search_space.py``); Tune decides which run when, and which
are stopped early. What is known of a trial lies in its run directory; a killed search goes on from there.
"""

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cluster.runtime.limits import cores
from cluster.runtime.placement import pick_device
from cluster.runtime.session import ray_session
from configs.errors import InputError, SiloweaveError
from configs.events import Listener
from configs.locks import working_on
from configs.run_directory import run_directory
from configs.schema.schema import RunConfig, TuneSettings
from configs.storage.files import write_atomic

_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean what they mean everywhere else
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints to standard output however quiet it is asked to be
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # our own events say more
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}
# The trial's own process only watches. A request must not be empty.
_ENDING_S = 60.0  # in which the trial of a search that was killed has ended
_DRIVER: dict[str, int | float] = {"memory": 2**20}


Outcome = Callable[[int, str, str], None]


@dataclass(frozen=True)
class Kind:
    """What a trial is. Its functions are imported on the nodes by name.

    Attributes:
        metrics: what may be minimised; the first one is, unless another is asked for.
        train: trains by a trial's settings, from where an earlier start came to, and passes every event on.
        points: what a trial has reached so far: ``step`` and each metric.
        last_step: the step at which a trial ends.
        bundles: what a trial's processes need, by process; none where they reserve it by themselves.
        comparable: whether trials are at the same point at the same step, so that bad ones can be stopped early.
        one_at_a_time: whether a trial waits for the one before it.
    """

    metrics: tuple[str, ...]
    train: Callable[[RunConfig, Listener], None]
    points: Callable[[RunConfig], list[dict[str, Any]]]
    last_step: Callable[[RunConfig], int]
    bundles: Callable[[RunConfig], list[dict[str, float]]]
    comparable: bool
    one_at_a_time: bool


def run_trials(
    trials: dict[int, RunConfig],
    known: dict[int, RunConfig],
    *,
    kind: Kind,
    metric: str,
    search: TuneSettings,
    storage: Path,
    max_parallel: int,
    on_outcome: Outcome,
) -> None:
    """Runs trials to their end, as many at once as the cluster has room for.

    Args:
        trials: settings of each trial that is to run, by number; what it starts from is there already.
        known: those that have ended in an earlier start: what they reached counts when others are stopped.
        kind: what a trial is.
        metric: what is minimised.
        search: when trials are stopped early.
        storage: folder for Tune's own files, which are of no use afterwards.
        max_parallel: most trials at once; 0: as many as there is room for.
        on_outcome: receives number, ``finished``, ``stopped`` or ``failed``, and the cause of a failure.

    Raises:
        InputError: the cluster has no room for a single gang.
    """
    os.environ.update(_ENVIRONMENT)
    from ray import tune

    parallel = 1 if kind.one_at_a_time else _at_once(trials, max_parallel)
    asha = _asha(search, metric, [*trials.values(), *known.values()]) if kind.comparable else None
    if asha is not None:
        _replay(asha, kind, known, metric)
    shutil.rmtree(storage, ignore_errors=True)

    def train(parameters: dict[str, Any]) -> None:
        _train(kind, trials[parameters["number"]])

    if not os.environ.get("SILOWEAVE_DEBUG"):
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    bundles = max((kind.bundles(config) for config in trials.values()), key=len)
    resources = tune.PlacementGroupFactory([dict(_DRIVER), *(dict(bundle) for bundle in bundles)])
    try:
        tune.Tuner(
            tune.with_resources(train, resources),
            param_space={"number": tune.grid_search(list(trials))},
            tune_config=tune.TuneConfig(scheduler=asha, max_concurrent_trials=parallel),
            run_config=tune.RunConfig(
                name="tune", storage_path=str(storage), verbose=0, callbacks=[_watcher(kind, trials, on_outcome)]
            ),
        ).fit()
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _train(kind: Kind, config: RunConfig) -> None:
    """Trains in the trial's process, and reports what the trial reaches, beginning with what an earlier start reached.

    Tune stops a trial inside of a report; what it started ends with its process.
    """
    from ray import tune

    reported = 0

    def catch_up() -> None:
        nonlocal reported
        for point in kind.points(config):
            if point["step"] > reported:
                reported = point["step"]
                tune.report(point)

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "validation":
            catch_up()

    _failure(config).unlink(missing_ok=True)
    catch_up()
    try:
        # A trial is a run like others. That of a search which was killed may be a moment from its end.
        with working_on(run_directory(config), patience_s=_ENDING_S):
            kind.train(config, on_event)
    except Exception as error:
        write_atomic(_failure(config), _one_line(error).encode())
        raise
    catch_up()


def _failure(config: RunConfig) -> Path:
    """The file in which a trial leaves why it failed: Tune tells that it failed before it knows why."""
    return run_directory(config) / "failure.txt"


def _one_line(error: Exception) -> str:
    text = str(error) if isinstance(error, SiloweaveError) else f"{type(error).__name__}: {error}"
    return next((line for line in text.splitlines() if line.strip()), "unknown")[:500]


def session(kind: Kind, configs: Sequence[RunConfig], max_parallel: int) -> AbstractContextManager[Any]:
    """A Ray for trials: the cluster that the settings name, or one of our own with as much room as there are cores."""
    if kind.one_at_a_time:
        first = configs[0].cluster
        return ray_session(first, max(first.world_size, *(len(kind.bundles(config)) for config in configs)))
    largest = max(
        (config.cluster for config in configs), key=lambda cluster: cluster.world_size * cluster.threads_per_rank
    )
    there = cores() // (largest.world_size * largest.threads_per_rank)
    at_once = min(max_parallel or max(there, 1), len(configs))
    return ray_session(largest, at_once * largest.world_size)


def _at_once(trials: dict[int, RunConfig], max_parallel: int) -> int:
    """How many gangs fit on the nodes together: more would wait for each other's places."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = min(_room(config, nodes) for config in trials.values())
    if room < 1:
        largest = max(trials.values(), key=lambda config: config.cluster.world_size)
        raise InputError(
            f"cluster.world_size {largest.cluster.world_size}: the Ray cluster has no room for one trial's gang (CPU "
            f"{sum(node.get('CPU', 0) for node in nodes):g}, GPU {sum(node.get('GPU', 0) for node in nodes):g}); lower "
            "cluster.world_size or cluster.threads_per_rank, or join a larger cluster"
        )
    return min(room, max_parallel or room)


def _room(config: RunConfig, nodes: list[dict[str, float]]) -> int:
    cluster = config.cluster
    gpus = sum(node.get("GPU", 0) for node in nodes)
    per_rank = {"CPU": cluster.threads_per_rank, **({"GPU": 1} if pick_device(config, gpus) == "cuda" else {})}
    places = sum(min(int(node.get(name, 0) // need) for name, need in per_rank.items()) for node in nodes)
    return places // cluster.world_size


def _asha(search: TuneSettings, metric: str, configs: Sequence[RunConfig]) -> Any:
    """Asynchronous successive halving (Li et al. 2018) in optimizer steps; None where no trial is to be stopped."""
    from ray.tune.schedulers import AsyncHyperBandScheduler

    longest = max(config.pretrain.steps for config in configs)
    grace_steps = search.grace_steps or min(config.pretrain.validate_every for config in configs)
    if not search.early_stopping or grace_steps > longest:
        return None
    return AsyncHyperBandScheduler(
        time_attr="step",
        metric=metric,
        mode="min",
        max_t=longest,
        grace_period=grace_steps,
        reduction_factor=search.reduction_factor,
        stop_last_trials=False,  # at its last validation a trial has its last commit still to make
    )


def _replay(asha: Any, kind: Kind, known: dict[int, RunConfig], metric: str) -> None:
    """Tells the scheduler what trials of earlier starts reached, as it was told then."""
    for number, config in known.items():
        trial = SimpleNamespace(trial_id=f"known-{number}")
        asha.on_trial_add(None, trial)
        for point in kind.points(config):
            asha.on_trial_result(None, trial, {"step": point["step"], metric: point[metric]})


def _watcher(kind: Kind, trials: dict[int, RunConfig], on_outcome: Outcome) -> Any:
    from ray import tune

    class Watcher(tune.Callback):
        """Passes on how trials end. Tune keeps a copy of its callbacks on disk: that of this one holds nothing."""

        def __init__(self, kind: Kind, configs: dict[int, RunConfig], on_outcome: Outcome) -> None:
            self._kind, self._configs, self._on_outcome = kind, configs, on_outcome

        def __getstate__(self) -> dict[str, Any]:
            return {}

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
            number = trial.config["number"]
            reached, last = self._kind.points(self._configs[number]), self._kind.last_step(self._configs[number])
            self._on_outcome(number, "finished" if reached and reached[-1]["step"] == last else "stopped", "")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
            told = _failure(self._configs[trial.config["number"]])
            cause = told.read_text(encoding="utf-8") if told.exists() else "its process died"
            self._on_outcome(trial.config["number"], "failed", cause)

    return Watcher(kind, trials, on_outcome)
