"""A run's figures as Ray's Prometheus metrics, which every Ray node serves on its metrics port.

The driver sets them from events, at most once per second: a gauge that is scraped every few seconds needs no more, and
training must not wait for it.
"""

import sys
import time
from typing import Any

from cluster.monitoring.scalars import position, scalars

_EVERY_S = 1.0
_GAUGES = {
    "step": "Last completed step, or round.",
    "steps": "Steps of the run.",
    "loss": "Training loss of the last step, nats a token.",
    "tokens_per_s": "Tokens a second over all ranks.",
    "gflop_per_s": "Model FLOP/s achieved over all ranks, in units of 1e9.",
    "mfu": "Achieved FLOP/s as a share of the devices' peak.",
    "memory_bytes": "Resident memory of rank 0's process.",
    "gpu_memory_bytes": "Most memory that was allocated on rank 0's GPU.",
    "validation_loss": "Validation loss, nats a token.",
    "validation_bits_per_char": "Validation bits per character.",
    "last_commit_step": "Newest committed step.",
    "last_commit_time": "Unix time of the newest commit.",
    "world_size": "Ranks of the gang.",
    "silos": "Silos that answered the last round.",
}
_FAILURES = "Failures of a rank or its node that cost a restart."


class RayMetrics:
    """Listens to events; shows them as ``ray_siloweave_NAME{run=..., stage=...}`` while a Ray is connected."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._metrics: dict[str, Any] = {}
        self._pending: dict[tuple[str, str], float] = {}
        self._last = 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        """Takes an event's figures; sets the newest ones, at once unless that was done less than a second ago."""
        stage = event["stage"]
        for name, value in _figures(event).items():
            self._pending[stage, name] = float(value)
        if event["event"] == "restart":
            self._pending[stage, "failures"] = self._pending.get((stage, "failures"), 0.0) + 1
        # Rare events are not held back: none may follow.
        if self._pending and (event["event"] != "step" or time.monotonic() - self._last >= _EVERY_S):
            self._publish()

    def _publish(self) -> None:
        ray = sys.modules.get("ray")  # not imported for this: stages without Ray would take seconds longer
        if ray is None or not ray.is_initialized():
            return
        self._last = time.monotonic()
        for (stage, name), value in self._pending.items():
            tags = {"run": self._run, "stage": stage}
            metric = self._metric(name)
            if name == "failures":
                metric.inc(value, tags=tags)
            else:
                metric.set(value, tags=tags)
        self._pending.clear()

    def _metric(self, name: str) -> Any:
        if name not in self._metrics:
            from ray.util.metrics import Counter, Gauge

            kind, text = (Counter, _FAILURES) if name == "failures" else (Gauge, _GAUGES[name])
            self._metrics[name] = kind(f"siloweave_{name}", description=text, tag_keys=("run", "stage"))
        return self._metrics[name]


def _figures(event: dict[str, Any]) -> dict[str, float]:
    found = {name: value for name, value in scalars(event).items() if name in _GAUGES}
    if event["event"] == "commit":
        return {"last_commit_step": event["step"], "last_commit_time": event["time"]}
    if event["event"] == "gang":
        return {"world_size": len(event["pids"])}
    if event["event"] in ("step", "round"):
        total = event["steps" if event["event"] == "step" else "rounds"]
        return {**found, "step": position(event) or 0, "steps": total}
    return found
