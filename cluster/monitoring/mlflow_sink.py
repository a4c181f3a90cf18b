"""A run's events as an MLflow run: settings as parameters, figures as metrics; a continued run is the same one there.

A thread of its own talks to the tracking server: training never waits for it, and never fails because of it.
"""

import json
import os
import queue
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from cluster.monitoring.scalars import position, scalars
from configs.errors import InputError, lines_of
from configs.printing import say
from configs.run_directory import flatten
from configs.schema.schema import RunConfig
from configs.storage.files import write_atomic
from configs.storage.layout import RunFiles

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
_EVERY_S = 1.0
_BATCH = 1000  # the most metrics that MLflow takes in one request
_LARGEST_BACKLOG = 100_000
_LONGEST_PARAMETER = 6000
_CLOSE_S = 30.0


class MLflow:
    """Listens to events and logs them to the MLflow at ``monitoring.mlflow``. Use as a context.

    The run's id is kept in ``mlflow.json`` of the run's directory. Where the server is lost later on, a line says so
    once, what was not sent is sent once it is back, and the rest is in ``events.jsonl`` anyway.

    Raises:
        InputError: the package mlflow is not installed, or nothing answers at the address.
    """

    def __init__(self, config: RunConfig, run_directory: Path) -> None:
        self._uri = config.monitoring.mlflow
        os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise InputError(
                f"monitoring.mlflow is {self._uri!r}: mlflow can't be imported ({error}); pip install "
                "'siloweave[mlflow]', or leave it empty"
            ) from None
        try:
            self._client: Any = MlflowClient(tracking_uri=self._uri)
            self._run = self._open(config, RunFiles(run_directory).mlflow)
        except Exception as error:  # SQLAlchemy's, requests' and MLflow's own: the address is what they share
            raise InputError(
                f"monitoring.mlflow is {self._uri!r}: no MLflow answers there ({lines_of(error)[0][:300]}); "
                "correct it or leave it empty"
            ) from None
        self._waiting: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._backlog: list[Any] = []
        self._lost = False
        self._sender = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._sender.start()

    def __enter__(self) -> "MLflow":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waiting.put(None)
        self._sender.join(_CLOSE_S)
        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        if not self._sender.is_alive():
            self._try(lambda: self._client.set_terminated(self._run, status))

    def __call__(self, event: dict[str, Any]) -> None:
        """Takes an event; it is sent within a second or so."""
        self._waiting.put(event)

    def _open(self, config: RunConfig, stored: Path) -> str:
        """The run of an earlier start, or a new one with the settings as its parameters."""
        if stored.exists():
            known = json.loads(stored.read_text(encoding="utf-8"))
            if known["tracking_uri"] == self._uri:
                self._client.update_run(known["run_id"], status="RUNNING")
                return str(known["run_id"])
        name = config.monitoring.mlflow_experiment
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        run = str(self._client.create_run(number, run_name=config.run.name).info.run_id)
        from mlflow.entities import Param

        shown = [(key, value) for key, value in flatten(config) if key != "run.encryption_key_file"]
        params = [Param(key, str(value)[:_LONGEST_PARAMETER]) for key, value in shown]
        for start in range(0, len(params), 100):
            self._client.log_batch(run, params=params[start : start + 100])
        write_atomic(stored, json.dumps({"tracking_uri": self._uri, "run_id": run}).encode() + b"\n")
        return run

    def _send_all(self) -> None:
        """The thread: gathers for a second, then sends; until there is nothing more to come."""
        from mlflow.entities import Metric

        going_on = True
        while going_on:
            events = [self._waiting.get()]
            deadline = time.monotonic() + _EVERY_S
            while events[-1] is not None and (left := deadline - time.monotonic()) > 0:
                with suppress(queue.Empty):
                    events.append(self._waiting.get(timeout=left))
            going_on = events[-1] is not None
            self._backlog += [
                Metric(f"{event['stage']}/{name}", float(value), int(event["time"] * 1000), position(event) or 0)
                for event in events
                if event is not None
                for name, value in scalars(event).items()
            ]
            del self._backlog[:-_LARGEST_BACKLOG]
            self._flush()

    def _flush(self) -> None:
        while self._backlog:
            batch = self._backlog[:_BATCH]
            if not self._try(lambda batch=batch: self._client.log_batch(self._run, metrics=batch)):
                return
            del self._backlog[: len(batch)]

    def _try(self, call: Any) -> bool:
        try:
            call()
        except Exception as error:  # whatever the network or a database raises: training goes on
            if not self._lost:
                say(f"mlflow: {self._uri}: {lines_of(error)[0][:300]}; training goes on", err=True)
            self._lost = True
            return False
        self._lost = False
        return True
