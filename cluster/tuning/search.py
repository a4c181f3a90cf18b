"""``siloweave tune``: searches settings; each trial is a run, the best one's settings are a file.

``runs/NAME/tune/`` holds ``trials/trial-NNNN/`` (a run directory each), ``tune.json``, ``best.toml``, ``trials.svg``.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cluster.run import Run
from cluster.tuning import ray_tune as tuning
from cluster.tuning.search_space import Parameter, Trial, draw_trials, is_federated, with_values
from cluster.tuning.trial_kinds import PRETRAIN, check_budget, federate_kind, give_corpora, give_model, spent
from configs.errors import InputError, SiloweaveError
from configs.parse import to_toml
from configs.run_directory import bind_run_directory, run_directory
from configs.schema.schema import RunConfig
from configs.storage.files import write_atomic
from configs.storage.layout import RunFiles

_ENDED = ("finished", "stopped")


class Search:
    """One search: its trials, and what is known of them. Kept in ``tune.json`` after every trial.

    Args:
        base: settings of everything that is not searched.
        parameters: what is searched.
        count: number of trials.
        metric: what is minimised; empty: the kind's first one.

    Raises:
        InputError: the parameters or the metric don't fit the settings, or the folder holds another search.
    """

    def __init__(self, base: RunConfig, parameters: Sequence[Parameter], count: int, metric: str) -> None:
        self.kind = federate_kind(base) if is_federated(parameters) else PRETRAIN
        self.base, self.metric = base, metric or self.kind.metrics[0]
        _check_metric(self.kind, self.metric, parameters)
        if base.run.url is not None:
            raise InputError(f"run.storage is {base.run.storage!r}: a search needs a folder that all nodes share")
        self.directory = RunFiles(run_directory(base)).tune
        self.parameters = [str(parameter) for parameter in parameters]
        trials = with_values(base, {"evaluate.without_dp": False}, "tune")  # a search does not measure what DP costs
        self.trials = draw_trials(trials, parameters, count, str(self.directory / "trials"))
        self.reserved: dict[str, dict[str, float]] | None = None
        self._states: dict[int, dict[str, Any]] = self._stored()

    @property
    def path(self) -> Path:
        """Where what is known of the trials is kept."""
        return RunFiles(self.directory.parent).tune_report

    def _stored(self) -> dict[int, dict[str, Any]]:
        """How the trials of an earlier start ended."""
        if not self.path.exists():
            return {}
        before = json.loads(self.path.read_text(encoding="utf-8"))
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
        finished = [row for row in trials if row["status"] == "finished" and row[self.metric] is not None]
        best = min(finished, key=lambda row: float(row[self.metric])) if finished else None
        return {
            "name": self.base.run.name,
            "directory": str(self.directory),
            "parameters": self.parameters,
            "metric": self.metric,
            "trials": trials,
            "reserved": self.reserved,
            "best": best and {"number": best["number"], "values": best["values"], self.metric: best[self.metric]},
            "best_config": str(self.directory / "best.toml") if best else None,
        }

    def _row(self, trial: Trial) -> dict[str, Any]:
        reached = self.kind.points(trial.config)
        last: dict[str, Any] = reached[-1] if reached else {}
        return {
            "number": trial.number,
            "directory": str(run_directory(trial.config)),
            "values": trial.values,
            "status": self.status(trial),
            "cause": self._states.get(trial.number, {}).get("cause", ""),
            "step": last.get("step", 0),
            "steps": self.kind.last_step(trial.config),
            **{name: last.get(name) for name in self.kind.metrics},
            "points": reached,
        }

    def write(self) -> dict[str, Any]:
        """Writes ``tune.json``. Returns what it holds."""
        document = self.document()
        write_atomic(self.path, json.dumps(document, indent=2).encode() + b"\n")
        return document


def _check_metric(kind: tuning.Kind, metric: str, parameters: Sequence[Parameter]) -> None:
    if metric not in kind.metrics:
        raise InputError(f"--metric {metric!r}: give {' or '.join(kind.metrics)}")
    shaping = [parameter.path for parameter in parameters if parameter.path.startswith(("tokenizer.", "data."))]
    if shaping and metric == "validation_loss":
        raise InputError(
            f"--metric validation_loss: a loss per token can't be compared where {shaping[0]} differs; give "
            "--metric validation_bits_per_char"
        )


def tune(run: Run, search: Search, max_parallel: int) -> dict[str, Any]:
    """Runs the trials that have not ended yet, and writes what came out.

    Returns:
        The document of ``tune.json``.

    Raises:
        InputError: the cluster has no room for a trial.
        SiloweaveError: no trial finished.
    """
    with run.stage("tune"):
        waiting = [trial for trial in search.trials if search.status(trial) not in _ENDED]
        if search.kind is not PRETRAIN:
            check_budget(run, waiting)
            give_model(run, waiting)
        else:
            give_corpora(run, waiting)
        search.write()
        if waiting:
            _run(run, search, waiting, max_parallel)
        return _publish(run, search)


def _run(run: Run, search: Search, waiting: list[Trial], max_parallel: int) -> None:
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
    with tuning.session(search.kind, [trial.config for trial in waiting], max_parallel):
        tuning.run_trials(
            {trial.number: trial.config for trial in waiting},
            {trial.number: trial.config for trial in search.trials if trial not in waiting},
            kind=search.kind,
            metric=search.metric,
            search=search.base.tune,
            storage=search.directory / "ray",
            max_parallel=max_parallel,
            on_outcome=on_outcome,
        )


def _publish(run: Run, search: Search) -> dict[str, Any]:
    if search.kind is not PRETRAIN:
        search.reserved = spent(run.config, run.model, search.trials)
    document = search.write()
    if document["best"] is None:
        causes = [row["cause"] for row in document["trials"] if row["cause"]]
        raise SiloweaveError(
            f"{search.directory}: no trial finished with a figure; the first failure: {causes[0] if causes else 'none'}"
        )
    best = with_values(
        search.base, {**document["best"]["values"], "run.name": f"{search.base.run.name}-best"}, "best.toml"
    )
    write_atomic(search.directory / "best.toml", to_toml(best).encode())
    from cluster.tuning.plot import plot

    write_atomic(search.directory / "trials.svg", plot(document).encode())
    return document


def table(document: dict[str, Any]) -> Any:
    """The trials at a glance, best first."""
    from rich.table import Table

    metric, best = document["metric"], document["best"]
    shown = Table(title=f"Tuning {document['name']}", title_justify="left")
    names = list(document["trials"][0]["values"])
    fields = [name.rpartition(".")[2] for name in names]
    short = fields if len(set(fields)) == len(fields) else names
    for name in ("trial", *short, "status", "step", metric):
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
