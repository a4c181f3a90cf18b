"""Tokens a second of pretraining in steady state: Siloweave's gang beside three peers that do the same work.

python benchmarks/pretrain.py --repetitions 5 --json pretrain.json

The same Llama of 4.2 million parameters, windows, optimizer and DeepSpeed ZeRO-2 settings, on two ranks with one thread
each: a plain loop under torchrun, Hugging Face Trainer, and the plain loop on Ray Train (``peers/``). Each reports the
global loss of every step, and these must agree, so that all are known to do the same work.

A repetition starts all four. Once they have warmed up, they take turns of a few seconds: all processes of the others
are stopped meanwhile (SIGSTOP), so that what the machine does to one it does to all. A rate is a run's steps over the
time that they took, over all its turns of a repetition; a ratio compares two of one repetition.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
from figures import setting, spread
from workload import SMALL, Workload, environment, steps_of

NAMES = ("siloweave", "torchrun", "hf_trainer", "ray_train")
LARGEST_DIFFERENCE = 1e-4
STEPS = 1000  # more than a repetition takes: nobody ends, commits or validates
SETTLE_S = 0.7  # of a turn, until caches and connections are back
START_S = 300.0
LAST_EVENTS_S = 2.0  # until Siloweave's driver has fetched the steps of the last turn
# Turns are short: after some 30 s without an answer, Ray's connections would count as lost.
SETTINGS = (*SMALL, "cluster.hang_timeout_s=3600")


class Competitor:
    """A run that is started, stopped and continued as a whole."""

    def __init__(self, workload: Workload, name: str, log: Path) -> None:
        self.name, self._log, self._record = name, log, workload.folder / f"{name}.jsonl"
        self._record.unlink(missing_ok=True)
        with log.open("w") as output:
            command = workload.command(name, self._record)
            self._process = subprocess.Popen(command, env=environment(), stdout=output, stderr=output)

    def steps(self) -> dict[int, dict[str, Any]]:
        """Its steps so far, by step."""
        if self._process.poll() is not None:
            raise SystemExit(f"{self.name} ended with {self._process.returncode}:\n{self._log.read_text()[-4000:]}")
        lines = self._record.read_text().splitlines() if self._record.exists() else []
        return steps_of([json.loads(line) for line in lines if line.endswith("}")])

    def send(self, number: signal.Signals) -> None:
        """Signals all its processes."""
        tree = psutil.Process(self._process.pid)
        for process in (tree, *tree.children(recursive=True)):
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue

    def end(self) -> None:
        """Ends all its processes."""
        if self._process.poll() is None:
            self.send(signal.SIGKILL)
        self._process.wait()


def await_steps(competitors: list[Competitor], number: int) -> None:
    """Returns once all have done so many steps."""
    deadline = time.monotonic() + START_S
    while not all(number in competitor.steps() for competitor in competitors):
        if time.monotonic() > deadline:
            raise SystemExit(f"not all have done {number} steps within {START_S:g} s")
        time.sleep(0.5)


def turn(competitor: Competitor, seconds: float) -> tuple[float, float]:
    """Lets one run, alone. Returns the time that counts, from and to, by the wall clock."""
    competitor.send(signal.SIGCONT)
    began = time.time() + SETTLE_S
    time.sleep(SETTLE_S + seconds)
    ended = time.time()
    competitor.send(signal.SIGSTOP)
    return began, ended


def rate(times: list[float], turns: list[tuple[float, float]]) -> float:
    """Steps a second, between the first and the last step of every turn."""
    steps, seconds = 0, 0.0
    for began, ended in turns:
        inside = [at for at in times if began <= at <= ended]
        if len(inside) > 1:
            steps, seconds = steps + len(inside) - 1, seconds + inside[-1] - inside[0]
    return steps / seconds


def repeat(workload: Workload, arguments: argparse.Namespace, first: int) -> tuple[dict[str, float], float]:
    """One repetition: tokens a second of each, and the largest relative difference of a loss to torchrun's."""
    workload.fresh()
    with ExitStack() as stack:
        competitors = []
        for name in NAMES:
            competitors.append(Competitor(workload, name, workload.folder / f"{name}.log"))
            stack.callback(competitors[-1].end)
        await_steps(competitors, arguments.warmup)
        turns: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
        for competitor in competitors:
            competitor.send(signal.SIGSTOP)
        for number in range(first, first + arguments.turns):
            order = number % len(NAMES)
            for competitor in (*competitors[order:], *competitors[:order]):
                turns[competitor.name].append(turn(competitor, arguments.seconds))
        for competitor in competitors:
            competitor.send(signal.SIGCONT)
        time.sleep(LAST_EVENTS_S)
        steps = {competitor.name: competitor.steps() for competitor in competitors}
    difference = same_losses({name: [found[step]["loss"] for step in sorted(found)] for name, found in steps.items()})
    rates = {name: rate([found[step]["time"] for step in sorted(found)], turns[name]) for name, found in steps.items()}
    return {name: workload.tokens_per_step * value for name, value in rates.items()}, difference


def same_losses(losses: dict[str, list[float]]) -> float:
    """The largest relative difference to torchrun's, which must be small: else the peers don't do the same work."""
    worst = max(
        (abs(mine - theirs) / theirs, name, step + 1)
        for name, values in losses.items()
        for step, (mine, theirs) in enumerate(zip(values, losses["torchrun"], strict=False))
    )
    if worst[0] > LARGEST_DIFFERENCE:
        raise SystemExit(f"{worst[1]} does other work: its loss at step {worst[2]} is off by {worst[0]:.2g}")
    return worst[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--turns", type=int, default=5, help="of each, in a repetition")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a turn")
    parser.add_argument("--warmup", type=int, default=10, help="steps before the first turn")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    runs: list[dict[str, float]] = []
    differences: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        workload = Workload(Path(folder), "tiny", SETTINGS, STEPS)
        for repetition in range(arguments.repetitions):
            rates, difference = repeat(workload, arguments, repetition)
            runs.append(rates)
            differences.append(difference)
            shown = ", ".join(f"{name} {value:,.0f}" for name, value in rates.items())
            print(f"{repetition + 1}: tokens/s: {shown}", file=sys.stderr, flush=True)
    peers = [name for name in NAMES if name != "siloweave"]
    ratios = {peer: [run["siloweave"] / run[peer] for run in runs] for peer in peers}
    document = {
        **setting(("ray", "torch", "deepspeed", "transformers", "accelerate")),
        "repetitions": arguments.repetitions,
        "turns": {"number": arguments.turns, "seconds": arguments.seconds},
        "largest_loss_difference": max(differences),
        "tokens_per_s": {name: spread([run[name] for run in runs]) for name in NAMES},
        "ratio": {peer: {**spread(values), "values": values} for peer, values in ratios.items()},
    }
    arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    for name in NAMES:
        found = document["tokens_per_s"][name]
        print(f"{name}: {found['median']:,.0f} tokens/s ({found['minimum']:,.0f} to {found['maximum']:,.0f})")
    for peer in peers:
        ratio = document["ratio"][peer]
        print(f"siloweave / {peer}: {ratio['median']:.3f} ({ratio['minimum']:.3f} to {ratio['maximum']:.3f})")
    print(f"losses agree to {document['largest_loss_difference']:.1g}")


if __name__ == "__main__":
    main()
