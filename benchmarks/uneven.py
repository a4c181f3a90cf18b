"""Wall time to the same loss with one silo ten times slower: buffered rounds beside synchronous ones.

python benchmarks/uneven.py --model runs/tiny/model --repetitions 3 --json uneven.json

Real silos with ledgers over the local grid, a process for each, on public plays. Every private step of the slow one
takes ten times as long: the rest of that time it sleeps, as a silo on a slow machine of its own would leave this one's
cores alone. Both schedules have the same plan, the same number of server steps and so the same epsilon; they alternate,
from new ledgers each. The loss is bits per character of the silos' held-out records, read in the clear after each step.
The time is from the first request to the first step that has reached a share of what the synchronous run of the same
repetition has gained in the end.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from figures import setting, spread

SLOW, SLOWER = "romances", 10
SILOS = {"comedies": 6000, "histories": 7000, SLOW: 2600}  # with their declared sizes
PLAYS, SHARES = "plays.jsonl", (0.5, 0.9)
SCHEDULES = {
    "synchronous": (),
    "buffered": ("federated.schedule=buffered", "federated.buffer=2"),
}


@contextmanager
def slow_steps() -> Iterator[None]:
    """Private steps that take ten times as long; a process answers for one silo at a time."""
    from privacy.mechanism.dp_sgd import PrivateTraining

    step = PrivateTraining._step

    def slow(*arguments: Any) -> Any:
        began = time.perf_counter()
        found = step(*arguments)
        time.sleep((SLOWER - 1) * (time.perf_counter() - began))
        return found

    PrivateTraining._step = slow  # type: ignore[method-assign]
    try:
        yield
    finally:
        PrivateTraining._step = step  # type: ignore[method-assign]


class SlowSilo:
    """A silo on a slow machine."""

    def __init__(self, silo: Any) -> None:
        self._silo, self.close = silo, silo.close

    def handle(self, content: bytes) -> bytes:
        with slow_steps():
            return bytes(self._silo.handle(content))


def open_silo(silos: dict[str, Any], trusted: frozenset[str], name: str) -> Any:
    from federated.silo.silo import Silo

    silo = Silo(silos[name], trusted)
    return SlowSilo(silo) if name == SLOW else silo


def settings_of(options: argparse.Namespace, folder: Path, schedule: str) -> Any:
    from configs.load import load

    counts = ", ".join(f"{name} = {count}" for name, count in SILOS.items())
    return load(
        "tiny",
        [
            f'data.private.source="{folder / PLAYS}"',
            f"data.private.public_record_counts={{{counts}}}",
            f"federated.state_dir={folder / 'state'}",
            f"federated.rounds={options.rounds}",
            f"federated.local_steps={options.steps}",
            "evaluate.without_dp=false",
            f"evaluate.max_records_per_silo={options.records}",
            *SCHEDULES[schedule],
        ],
    )


def federate(ray: Any, options: argparse.Namespace, schedule: str, folder: Path) -> dict[str, Any]:
    """One federation: seconds and loss after each server step."""
    from configs.events import read_events
    from federated.coordinator import round_commits as commits
    from federated.coordinator.parties import Parties
    from federated.coordinator.rounds import run_federation
    from federated.identity.trust import coordinator_signer
    from federated.simulation.in_the_clear import score_silos, summary
    from federated.simulation.local_grid import LocalGrid
    from federated.simulation.simulation import simulated_silos
    from trainer.data.embedded import plays

    folder.mkdir()
    rows = [row for row in plays() if row["silo"] in SILOS]
    (folder / PLAYS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings_of(options, folder, schedule)
    silos, signer = simulated_silos(config, options.model), coordinator_signer(Path(config.federated.state_dir))
    opener, directory = partial(open_silo, silos, frozenset({signer.public_key})), folder / "federated"
    with LocalGrid(ray, opener, silos, len(silos), threads=1) as grid:
        run_federation(grid, config, options.model, directory, Parties(signer, len(silos)), lambda _: None)
    rounds = [event for event in read_events(directory / "events.jsonl") if event["event"] == "round"]
    began = rounds[0]["time"] - rounds[0]["seconds"]
    score = partial(score_silos, config, silos, limit=options.records)
    start, *found = commits.all_rounds(directory)
    certificate = json.loads((directory / "certificate.json").read_text())
    return {
        "seconds": [event["time"] - began for event in rounds],
        "loss": [summary(score(one.adapter))["bits_per_char"] for one in found],
        "base": summary(score(start.adapter))["bits_per_char"],
        "epsilon": certificate["epsilon"],
        "of_slow": sum(event.get("updates", dict.fromkeys(event["answered"], 1)).get(SLOW, 0) for event in rounds),
    }


def seconds_to(run: dict[str, Any], loss: float) -> float:
    """Until a step has reached it; infinite where none has."""
    return next((s for s, found in zip(run["seconds"], run["loss"], strict=True) if found <= loss), float("inf"))


def compared(runs: dict[str, dict[str, Any]]) -> dict[str, float]:
    """One repetition's figures."""
    synchronous, buffered = runs["synchronous"], runs["buffered"]
    found = {}
    for share in SHARES:
        loss = synchronous["base"] - share * (synchronous["base"] - synchronous["loss"][-1])
        both = seconds_to(synchronous, loss), seconds_to(buffered, loss)
        found |= {f"synchronous to {share:.0%}": both[0], f"buffered to {share:.0%}": both[1]}
        found[f"ratio to {share:.0%}"] = both[1] / both[0]
    for name, run in runs.items():
        found |= {f"{name}, all steps": run["seconds"][-1], f"{name}, last loss": run["loss"][-1]}
        found |= {f"{name}, epsilon": run["epsilon"], f"{name}, updates of the slow silo": run["of_slow"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="an exported model, as runs/tiny/model")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--records", type=int, default=50, help="held-out records of each silo that are scored")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.model = options.model.absolute()
    from cluster.runtime.session import ray_session
    from configs.load import load

    root, repetitions = Path(tempfile.mkdtemp(prefix="uneven-")), []
    with ray_session(load("tiny").cluster, len(SILOS)) as ray:
        for number in range(options.repetitions):
            runs = {name: federate(ray, options, name, root / f"{name}-{number}") for name in SCHEDULES}
            repetitions.append(compared(runs))
            print(json.dumps(repetitions[-1]), flush=True)
    result = {
        **setting(["siloweave", "torch", "ray", "flwr"]),
        "rounds": options.rounds,
        "local_steps": options.steps,
        "slower": SLOWER,
        "figures": {name: spread([one[name] for one in repetitions]) for name in repetitions[0]},
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
