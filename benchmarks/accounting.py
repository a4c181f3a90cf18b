"""Seconds for one epsilon, by our accountant and its peers, and for calibration; interleaved, nothing cached.

python benchmarks/accounting.py --json accounting.json
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from figures import setting, spread
from opacus.accountants import PRVAccountant

from privacy.accounting.accountant import calibrate, schedule_epsilon
from privacy.accounting.schedule import Schedule

DELTA = 1e-6
# Sampling rate and noise multiplier; those of one row cost about as much at other settings of the same epsilon.
SETTINGS = [(0.001, 0.8), (0.01, 1.0), (0.1, 4.0)]


def prv(schedule: Schedule) -> float:
    accountant = PRVAccountant()
    accountant.history = [(schedule.noise_multiplier, schedule.sampling_rate, schedule.steps)]
    return float(accountant.get_epsilon(DELTA))


@cache
def target(schedule: Schedule) -> float:
    """The epsilon that the schedule's own noise has, so that the answer of calibration is known."""
    return schedule_epsilon(schedule, DELTA)


def calibrated(schedule: Schedule) -> float:
    return calibrate(target(schedule), DELTA, schedule.with_noise(1.0))


JOBS: dict[str, Callable[[Schedule], float]] = {
    "siloweave": lambda schedule: schedule_epsilon(schedule, DELTA),
    "dp_accounting PLDAccountant": lambda schedule: PLDAccountant().compose(schedule.event()).get_epsilon(DELTA),
    "dp_accounting RdpAccountant": lambda schedule: RdpAccountant().compose(schedule.event()).get_epsilon(DELTA),
    "opacus PRVAccountant": prv,
    "siloweave calibrate": calibrated,
}


def measure(repetitions: int, steps: list[int]) -> dict[str, dict[str, Any]]:
    seconds: dict[str, list[float]] = {}
    results: dict[str, float] = {}
    for _ in range(repetitions):
        for q, sigma in SETTINGS:
            for count in steps:
                target(Schedule(count, q, sigma))
                for job, run in JOBS.items():
                    schedule_epsilon.cache_clear()
                    calibrate.cache_clear()
                    name = f"{job}, q {q:g}, sigma {sigma:g}, {count} steps"
                    began = time.perf_counter()
                    results[name] = run(Schedule(count, q, sigma))
                    seconds.setdefault(name, []).append(time.perf_counter() - began)
    return {name: {**spread(values), "result": results[name]} for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 100, 1000, 10_000])
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    figures = measure(arguments.repetitions, arguments.steps)
    document = {
        **setting(("dp-accounting", "opacus", "numpy", "scipy")),
        "repetitions": arguments.repetitions,
        "delta": DELTA,
        "seconds": figures,
    }
    arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    for name, value in figures.items():
        print(
            f"{name}: {value['median']:.3f} s ({value['minimum']:.3f} to {value['maximum']:.3f}), {value['result']:.5g}"
        )


if __name__ == "__main__":
    main()
