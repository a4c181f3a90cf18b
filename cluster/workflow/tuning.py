"""``siloweave tune``: searches settings of pretraining; each trial is a run, the best one's settings are a file.

``runs/NAME/tune/`` holds ``trials/trial-NNNN/`` (a run directory each), ``tune.json``, ``best.toml``, ``trials.svg``.
"""

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cluster.runtime import tuning
from cluster.workflow import pipeline
from cluster.workflow.listeners import listening
from cluster.workflow.search_space import Parameter, Trial, draw_trials, with_values
from configs.artifacts import digest_json, write_atomic
from configs.errors import InputError, SiloweaveError
from configs.load import bind_run_directory, run_directory, to_toml
from configs.schema import RunConfig

_ENDED = ("finished", "stopped")


class Search:
    """One search: its trials, and what is known of them. Kept in ``tune.json`` after every trial.

    Args:
        base: settings of everything that is not searched.
        parameters: what is searched.
        count: number of trials.
        metric: what is minimised.

    Raises:
        InputError: the parameters or the metric don't fit the settings, or the folder holds another search.
    """

    def __init__(self, base: RunConfig, parameters: Sequence[Parameter], count: int, metric: str) -> None:
        _check_metric(metric, parameters)
        if base.run.url is not None:
            raise InputError(f"run.storage is {base.run.storage!r}: a search needs a folder that all nodes share")
        self.base, self.metric = base, metric
        self.directory = run_directory(base) / "tune"
        self.parameters = [str(parameter) for parameter in parameters]
        self.trials = draw_trials(base, parameters, count, str(self.directory / "trials"))
        self._states: dict[int, dict[str, Any]] = self._stored()

    @property
    def _path(self) -> Path:
        return self.directory / "tune.json"

    def _stored(self) -> dict[int, dict[str, Any]]:
        """How the trials of an earlier start ended."""
        if not self._path.exists():
            return {}
        before = json.loads(self._path.read_text(encoding="utf-8"))
        if (before["parameters"], before["metric"]) != (self.parameters, self.metric):
            other = " ".join([*before["parameters"], before["metric"]])
            raise InputError(
                f"{self.directory}: holds another search ({other}); choose another run.name, or delete that directory"
            )
        return {trial["number"]: {"status": trial["status"], "cause": trial["cause"]} for trial in before["trials"]}

    def status(self, trial: Trial) -> str:
        """``waiting``, ``finished``, ``stopped`` or ``failed``."""
        return str(self._states.get(trial.number, {}).get("status", "waiting"))

    def ended(self, number: int, status: str, cause: str) -> None:
        """Takes note of how a trial ended, for good."""
        self._states[number] = {"status": status, "cause": cause}
        self.write()

    def document(self) -> dict[str, Any]:
        """The whole search, for machines."""
        trials = [self._row(trial) for trial in self.trials]
        finished = [row for row in trials if row["status"] == "finished"]
        best = min(finished, key=lambda row: float(row[self.metric])) if finished else None
        return {
            "name": self.base.run.name,
            "directory": str(self.directory),
            "parameters": self.parameters,
            "metric": self.metric,
            "trials": trials,
            "best": best and {"number": best["number"], "values": best["values"], self.metric: best[self.metric]},
            "best_config": str(self.directory / "best.toml") if best else None,
        }

    def _row(self, trial: Trial) -> dict[str, Any]:
        reached = tuning.validations(trial.config)
        last: dict[str, Any] = reached[-1] if reached else {}
        return {
            "number": trial.number,
            "directory": str(run_directory(trial.config)),
            "values": trial.values,
            "status": self.status(trial),
            "cause": self._states.get(trial.number, {}).get("cause", ""),
            "step": last.get("step", 0),
            "steps": trial.config.pretrain.steps,
            **{name: last.get(field) for name, field in tuning.METRICS.items()},
            "validations": reached,
        }

    def write(self) -> dict[str, Any]:
        """Writes ``tune.json``. Returns what it holds."""
        document = self.document()
        write_atomic(self._path, json.dumps(document, indent=2).encode() + b"\n")
        return document


def _check_metric(metric: str, parameters: Sequence[Parameter]) -> None:
    if metric not in tuning.METRICS:
        raise InputError(f"--metric {metric!r}: give one of {', '.join(tuning.METRICS)}")
    shaping = [parameter.path for parameter in parameters if parameter.path.startswith(("tokenizer.", "data."))]
    if shaping and metric == "validation_loss":
        raise InputError(
            f"--metric validation_loss: a loss a token can't be compared where {shaping[0]} differs; give "
            "--metric validation_bits_per_char"
        )


def tune(run: pipeline.Run, search: Search, max_parallel: int) -> dict[str, Any]:
    """Runs the trials that have not ended yet, and writes what came out.

    Returns:
        The document of ``tune.json``.

    Raises:
        InputError: the cluster has no room for a trial.
        SiloweaveError: no trial finished.
    """
    with run.stage("tune"):
        waiting = [trial for trial in search.trials if search.status(trial) not in _ENDED]
        _give_corpora(run, waiting)
        search.write()
        if waiting:
            _run(run, search, waiting, max_parallel)
        return _publish(search)


def _run(run: pipeline.Run, search: Search, waiting: list[Trial], max_parallel: int) -> None:
    def on_outcome(number: int, status: str, cause: str) -> None:
        search.ended(number, status, cause)
        done = sum(search.status(trial) != "waiting" for trial in search.trials)
        row = search.document()["trials"][number]
        run.log.emit(
            "tune",
            "trial",
            trial=number,
            done=done,
            of=len(search.trials),
            status=status,
            step=row["step"],
            value=row[search.metric],
            **({"cause": cause} if cause else {}),
        )

    for trial in waiting:
        bind_run_directory(trial.config)
    with tuning.session([trial.config for trial in waiting], max_parallel):
        tuning.run_trials(
            {trial.number: trial.config for trial in waiting},
            {trial.number: trial.config for trial in search.trials if trial not in waiting},
            metric=search.metric,
            search=search.base.tune,
            storage=search.directory / "ray",
            max_parallel=max_parallel,
            pretrain=pretrain_trial,
            on_outcome=on_outcome,
        )


def pretrain_trial(config: RunConfig, on_event: Any) -> None:
    """One trial: a whole pretraining run, with the listeners that its settings ask for."""
    with listening(config) as listeners:
        pipeline.pretrain(pipeline.Run(config, (*listeners, on_event)))


def _give_corpora(run: pipeline.Run, trials: list[Trial]) -> None:
    """Prepares each corpus once, and links it into the run directory of every trial that trains on it."""
    for trial in trials:
        key = _shaping(trial.config)
        source = run if key == _shaping(run.config) else _corpus_run(run, trial.config, key)
        if not (source.directory / "corpus" / "manifest.json").exists():
            pipeline.prepare(source)
        folder = run_directory(trial.config)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("corpus", "tokenizer"):
            link = folder / name
            if not link.is_symlink():
                link.symlink_to(os.path.relpath(source.directory / name, folder), target_is_directory=True)


def _shaping(config: RunConfig) -> str:
    """Digest of the settings that a prepared corpus may depend on."""
    data = config.data.model_dump(exclude={"private"})
    return digest_json([data, config.tokenizer.model_dump(), config.model.context_length, config.run.seed])


def _corpus_run(run: pipeline.Run, config: RunConfig, key: str) -> pipeline.Run:
    where = {"run.storage": str(run.directory / "tune" / "corpora"), "run.name": key[:16]}
    return pipeline.Run(with_values(config, where, "tune"))


def _publish(search: Search) -> dict[str, Any]:
    document = search.write()
    if document["best"] is None:
        causes = [row["cause"] for row in document["trials"] if row["cause"]]
        raise SiloweaveError(
            f"{search.directory}: no trial finished; the first failure: {causes[0] if causes else '?'}"
        )
    best = with_values(
        search.base, {**document["best"]["values"], "run.name": f"{search.base.run.name}-best"}, "best.toml"
    )
    write_atomic(search.directory / "best.toml", to_toml(best).encode())
    from cluster.workflow.tuning_plot import plot

    write_atomic(search.directory / "trials.svg", plot(document).encode())
    return document


def table(document: dict[str, Any]) -> Any:
    """The trials at a glance, best first."""
    from rich.table import Table

    metric, best = document["metric"], document["best"]
    shown = Table(title=f"Tuning {document['name']}", title_justify="left")
    names = list(document["trials"][0]["values"])
    for name in ("trial", *names, "status", "step", metric):
        shown.add_column(name, justify="left" if name == "status" else "right", overflow="fold")
    rank = partial(_rank, metric)
    for row in sorted(document["trials"], key=rank):
        mark = "*" if best and row["number"] == best["number"] else ""
        value = "" if row[metric] is None else f"{row[metric]:.4f}"
        values = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row["values"].values()]
        shown.add_row(f"{row['number']}{mark}", *values, row["status"], f"{row['step']}/{row['steps']}", value)
    return shown


def _rank(metric: str, row: dict[str, Any]) -> tuple[bool, float]:
    value = row[metric]
    return row["status"] != "finished", float("inf") if value is None else float(value)
