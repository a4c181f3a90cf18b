"""Seconds from the SIGKILL of a rank to the next completed step, and steps lost: warm standbys, none, and Ray Train.

python benchmarks/recovery.py --repetitions 5 --json recovery.json

The tiny model on two ranks of this machine. A cold restart begins with new processes that import everything; a warm one
with standbys that have. Ray Train (v2) runs the same work with a failure policy, and reports DeepSpeed's shards as a
checkpoint as often as the gang commits. The kill is sent between commits, after 30 steps and once the standbys are
warm, to each rank in turn. A repetition starts each of the three once.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from figures import setting, spread, spreads
from workload import Workload, environment

COMMIT_EVERY = 20
STEPS_BEFORE_KILL = 30
TIMEOUT_S = 600.0
# The tiny preset, long enough.
STEPS = 1_000_000
SETTINGS = (f"pretrain.commit_every={COMMIT_EVERY}", "cluster.max_failures=1")


class Done(Exception):
    """The gang has recovered."""


class Killer:
    """Listens to a gang; kills a rank, and times what follows.

    Args:
        victim: the rank to kill.
        standbys: how many must be warm before.
    """

    def __init__(self, victim: int, standbys: int) -> None:
        self.figures: dict[str, float] = {}
        self._victim, self._standbys = victim, standbys
        self._pids: list[int] = []
        self._warm = self._steps = self._last = 0
        self._marks: dict[str, float] = {}

    def __call__(self, event: dict[str, Any]) -> None:
        handle = getattr(self, f"_{event['event']}", None)
        if handle is not None:
            handle(event)

    def _gang(self, event: dict[str, Any]) -> None:
        self._pids = event["pids"]

    def _standby(self, _: dict[str, Any]) -> None:
        self._warm += 1

    def _restart(self, _: dict[str, Any]) -> None:
        self._marks["restart"] = time.time()

    def _resume(self, event: dict[str, Any]) -> None:
        self._marks["resume"] = event["time"]

    def _step(self, event: dict[str, Any]) -> None:
        if "resume" in self._marks:
            self._recovered(event)
        self._last, self._steps = event["step"], self._steps + 1
        between = event["step"] % COMMIT_EVERY == COMMIT_EVERY // 2
        if "kill" not in self._marks and between and self._steps >= STEPS_BEFORE_KILL and self._warm >= self._standbys:
            self._marks["kill"] = time.time()
            os.kill(self._pids[self._victim], signal.SIGKILL)

    def _recovered(self, event: dict[str, Any]) -> None:
        marks = self._marks
        self.figures = {
            "seconds": event["time"] - marks["kill"],
            "detect": marks["restart"] - marks["kill"],
            "rendezvous_and_resume": marks["resume"] - marks["restart"],
            "first_step": event["time"] - marks["resume"],
            "steps_lost": float(self._last - event["step"] + 1),
        }
        raise Done


def measure_gang(workload: Workload, victim: int, *, standbys: bool) -> dict[str, float]:
    """One kill of a gang of ours."""
    from cluster.runtime.gang import run_gang
    from cluster.runtime.session import ray_session

    workload.fresh()
    cluster = workload.config.cluster.model_copy(update={"standbys": standbys})
    config = workload.config.model_copy(update={"cluster": cluster})
    killer = Killer(victim, cluster.world_size if standbys else 0)
    with ray_session(cluster, cluster.world_size), suppress(Done):
        run_gang(config, workload.run_directory, killer)
    return killer.figures


def measure_ray_train(workload: Workload, victim: int) -> dict[str, float]:
    """One kill of a worker of Ray Train's."""
    workload.fresh()
    record = workload.folder / "ray_train.jsonl"
    record.unlink(missing_ok=True)
    command = workload.command("ray_train", record, "--commit-every", str(COMMIT_EVERY), "--max-failures", "1")
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return kill_and_recover(follow(record, process), victim)
    finally:
        process.terminate()  # Ray ends its processes with the driver
        process.wait(60)


def kill_and_recover(lines: Iterator[dict[str, Any]], victim: int) -> dict[str, float]:
    """Kills one of the workers that the lines tell of."""
    workers: list[int] = []
    killed = restarted = 0.0
    steps = last = 0
    for line in lines:
        if "worker" in line:
            workers.append(line["worker"])
            restarted = line["time"]
        elif "step" in line and killed and len(workers) > 2:
            return {
                "seconds": line["time"] - killed,
                "new_workers": restarted - killed,
                "import_and_resume": line["time"] - restarted,
                "steps_lost": float(last - line["step"] + 1),
            }
        elif "step" in line:
            steps, last = steps + 1, line["step"]
            if not killed and steps >= STEPS_BEFORE_KILL and last % COMMIT_EVERY == COMMIT_EVERY // 2:
                killed = time.time()
                os.kill(workers[victim], signal.SIGKILL)
    raise AssertionError("the run ended before it had recovered")


def follow(path: Path, process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """A process' lines as they come."""
    deadline, rest = time.monotonic() + TIMEOUT_S, ""
    while not path.exists() and process.poll() is None:
        time.sleep(0.1)
    with path.open() as file:
        while process.poll() is None and time.monotonic() < deadline:
            *lines, rest = (rest + file.read()).split("\n")
            yield from map(json.loads, lines)
            time.sleep(0.002)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    os.environ.update({name: value for name, value in environment().items() if name not in os.environ})
    runs: dict[str, list[dict[str, float]]] = {"warm": [], "cold": [], "ray_train": []}
    with tempfile.TemporaryDirectory() as folder:
        workload = Workload(Path(folder), "tiny", SETTINGS, STEPS)
        for repetition in range(arguments.repetitions):
            victim = repetition % workload.config.cluster.world_size
            runs["warm"].append(measure_gang(workload, victim, standbys=True))
            runs["cold"].append(measure_gang(workload, victim, standbys=False))
            runs["ray_train"].append(measure_ray_train(workload, victim))
            seconds = ", ".join(f"{name} {found[-1]['seconds']:.2f} s" for name, found in runs.items())
            print(f"{repetition + 1}: {seconds}", file=sys.stderr, flush=True)
    ratios = [ours["seconds"] / theirs["seconds"] for ours, theirs in zip(runs["warm"], runs["ray_train"], strict=True)]
    document = {
        **setting(("ray", "torch", "deepspeed", "transformers")),
        "repetitions": arguments.repetitions,
        "figures": {name: spreads(found) for name, found in runs.items()},
        "ratio": {"ray_train": spread(ratios)},
    }
    arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    for name, group in document["figures"].items():
        for part, value in group.items():
            print(f"{name} {part}: {value['median']:.3g} ({value['minimum']:.3g} to {value['maximum']:.3g})")


if __name__ == "__main__":
    main()
