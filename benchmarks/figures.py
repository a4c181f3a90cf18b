"""What every benchmark writes beside its figures, and how a figure is summed up."""

import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "minimum": min(values), "maximum": max(values)}


def spreads(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """The same of every figure of several runs."""
    return {name: spread([run[name] for run in runs]) for name in runs[0]}


def setting(libraries: Iterable[str]) -> dict[str, Any]:
    """Date, machine and the libraries' versions."""
    return {
        "date": datetime.now(tz=UTC).date().isoformat(),
        "machine": {"processor": processor(), "cores": len(os.sched_getaffinity(0)), "load_1min": os.getloadavg()[0]},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
    }


def processor() -> str:
    """The processor's name, as the system gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
