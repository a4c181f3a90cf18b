"""Seconds from the SIGKILL of a rank to the next completed step, and steps lost, with warm standbys and without.

python benchmarks/recovery.py --repetitions 5 --json recovery.json

The tiny model on two ranks of this machine. A cold restart begins with new processes that import everything; a warm one
with standbys that have. The kill is sent between commits, once the gang has made 30 steps and its standbys are warm.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from figures import setting, spreads

COMMIT_EVERY = 20
STEPS_BEFORE_KILL = 30


class Done(Exception):
    """The last repetition has recovered."""


class Killer:
    """Listens to a gang; kills a rank, and times what follows, again and again."""

    def __init__(self, repetitions: int, standbys: int) -> None:
        self.runs: list[dict[str, float]] = []
        self._repetitions, self._standbys = repetitions, standbys
        self._pids: list[int] = []
        self._warm = self._steps = self._last = 0
        self._killed: float | None = None
        self._marks: dict[str, float] = {}

    def __call__(self, event: dict[str, Any]) -> None:
        handle = getattr(self, f"_{event['event']}", None)
        if handle is not None:
            handle(event)

    def _gang(self, event: dict[str, Any]) -> None:
        self._pids, self._warm, self._steps = event["pids"], 0, 0

    def _standby(self, _: dict[str, Any]) -> None:
        self._warm += 1

    def _restart(self, _: dict[str, Any]) -> None:
        self._marks["restart"] = time.time()

    def _resume(self, event: dict[str, Any]) -> None:
        self._marks["resume"] = event["time"]

    def _step(self, event: dict[str, Any]) -> None:
        self._steps += 1
        if self._killed is not None and "resume" in self._marks:
            self._recovered(event)
        elif self._killed is None:
            self._last = event["step"]
            between = event["step"] % COMMIT_EVERY == COMMIT_EVERY // 2
            if between and self._steps >= STEPS_BEFORE_KILL and self._warm >= self._standbys:
                self._kill()
        else:
            self._last = event["step"]  # completed before the kill arrived

    def _kill(self) -> None:
        if len(self.runs) == self._repetitions:
            raise Done
        self._marks = {}
        self._killed = time.time()
        os.kill(self._pids[len(self.runs) % len(self._pids)], signal.SIGKILL)

    def _recovered(self, event: dict[str, Any]) -> None:
        killed, marks = self._killed or 0.0, self._marks
        self.runs.append(
            {
                "seconds": event["time"] - killed,
                "detect": marks["restart"] - killed,
                "rendezvous_and_resume": marks["resume"] - marks["restart"],
                "first_step": event["time"] - marks["resume"],
                "steps_lost": float(self._last - event["step"] + 1),
            }
        )
        print(f"  {self.runs[-1]['seconds']:.2f} s", file=sys.stderr)
        self._killed = None


def measure(repetitions: int, *, standbys: bool) -> list[dict[str, float]]:
    """Kills and recoveries of one gang, in a folder of its own."""
    from cluster.runtime.gang import run_gang
    from cluster.runtime.session import ray_session
    from configs.load import load
    from trainer.data.prepare import prepare

    with tempfile.TemporaryDirectory() as folder:
        config = load("tiny", list(settings(folder, repetitions, standbys=standbys)))
        directory = Path(folder) / "tiny"
        prepare(config, directory, None)
        killer = Killer(repetitions, config.cluster.world_size if standbys else 0)
        with ray_session(config.cluster, config.cluster.world_size):
            try:
                run_gang(config, directory, killer)
            except Done:
                return killer.runs
    raise AssertionError("the run ended before its last kill")


def settings(folder: str, repetitions: int, *, standbys: bool) -> Iterator[str]:
    """The tiny preset, long enough."""
    yield f'run.storage="{folder}"'
    yield f"cluster.standbys={str(standbys).lower()}"
    yield f"cluster.max_failures={repetitions}"
    yield f"pretrain.commit_every={COMMIT_EVERY}"
    yield "pretrain.steps=1000000"
    yield "pretrain.validate_every=1000000"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    figures = {}
    for name, standbys in (("warm", True), ("cold", False)):
        print(name, file=sys.stderr)
        figures[name] = spreads(measure(arguments.repetitions, standbys=standbys))
    document = {
        **setting(("ray", "torch", "deepspeed", "transformers")),
        "repetitions": arguments.repetitions,
        "figures": figures,
    }
    arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    for name, group in figures.items():
        for part, value in group.items():
            print(f"{name} {part}: {value['median']:.3g} ({value['minimum']:.3g} to {value['maximum']:.3g})")


if __name__ == "__main__":
    main()
