"""Seconds from the command to the first completed step, and where they go: Siloweave beside three peers.

python benchmarks/startup.py --repetitions 5 --json startup.json

The Llama of 4.2 million parameters on two ranks of this machine. Siloweave is its command, `siloweave pretrain`, with a
Ray of its own; the peers are those of pretrain.py. A repetition starts each once, in an order that turns.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import setting, spread, spreads
from workload import SMALL, Workload, steps_of

NAMES = {"siloweave": "command", "torchrun": "torchrun", "hf_trainer": "hf_trainer", "ray_train": "ray_train"}
STEPS = 2
# What lies between a peer's marks, by the mark at its end.
PARTS = {
    "started": "launcher",
    "driver imported": "imports of the driver",
    "ray": "ray.init",
    "worker": "workers",
    "imported": "imports of the ranks",
    "joined": "join",
    "built": "build",
}


def parts_of_peer(began: float, lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds of every part, by the peer's marks."""
    parts, last = {}, began
    for line in lines:
        if "mark" in line:
            parts[PARTS[line["mark"]]] = line["time"] - last
            last = line["time"]
    return {**parts, "first step": steps_of(lines)[1]["time"] - last}


def parts_of_command(began: float, events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The same by the events of a run, as its driver saw them."""
    at = {event["event"]: event for event in reversed(events)}
    ranks = at["started"]["seconds"]
    first, gang = steps_of(events)[1], at["gang"]["time"]
    return {
        "imports of the command": at["start"]["time"] - began,
        "ray.init and actors": gang - at["start"]["time"],
        "imports of the ranks": ranks["import"],
        "join": ranks["join"],
        "build": ranks["build"] + ranks["resume"],
        "first step": first["seconds"],
        "between": first["time"] - gang - sum(ranks.values()) - first["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory() as folder:
        workload = Workload(Path(folder), "tiny", SMALL, STEPS)
        for repetition in range(arguments.repetitions):
            order = list(NAMES)[repetition % len(NAMES) :] + list(NAMES)[: repetition % len(NAMES)]
            for name in order:
                began, lines = workload.run(NAMES[name])
                parts = (parts_of_command if name == "siloweave" else parts_of_peer)(began, lines)
                runs[name].append({**parts, "total": steps_of(lines)[1]["time"] - began})
                print(f"{repetition + 1}: {name} {runs[name][-1]['total']:.1f} s", file=sys.stderr, flush=True)
    ratios = {
        name: spread(
            [ours["total"] / theirs["total"] for ours, theirs in zip(runs["siloweave"], runs[name], strict=True)]
        )
        for name in NAMES
        if name != "siloweave"
    }
    document = {
        **setting(("ray", "torch", "deepspeed", "transformers", "accelerate")),
        "repetitions": arguments.repetitions,
        "seconds": {name: spreads(found) for name, found in runs.items()},
        "ratio": ratios,
    }
    arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    for name, parts in document["seconds"].items():
        total = parts["total"]
        print(f"{name}: {total['median']:.1f} s ({total['minimum']:.1f} to {total['maximum']:.1f})")
        print("  " + ", ".join(f"{part} {value['median']:.1f}" for part, value in parts.items() if part != "total"))


if __name__ == "__main__":
    main()
