"""What commits cost: the wall time of pretraining with a commit every 50 steps against the same with one at the end.

python benchmarks/commits.py --repetitions 5 --json commits.json

The tiny model on two ranks of this machine, 400 steps, each pair of runs one right after the other, in turns first. Two
times of each: `training`, from the first step to the last commit, and `total`, which begins with the gang's start.
`blocked_share` is the share of the training in which rank 0 stood still for commits, by its own clock.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from figures import setting, spread, spreads

STEPS, COMMIT_EVERY = 400, 50


def run_once(folder: str, commit_every: int) -> dict[str, float]:
    """One pretraining from its first step, on a gang of its own, in a Ray that is there."""
    from cluster.runtime.gang import run_gang
    from configs.load import load

    events: list[dict[str, Any]] = []
    directory = Path(folder) / "tiny"
    shutil.rmtree(directory / "pretrain", ignore_errors=True)
    began = time.time()
    run_gang(load("tiny", settings(folder, commit_every)), directory, events.append)
    first = next(event["time"] for event in events if event["event"] == "step")
    commits = [event for event in events if event["event"] == "commit"]
    assert [event["step"] for event in commits] == list(range(commit_every, STEPS + 1, commit_every))
    training = commits[-1]["time"] - first
    return {
        "training_s": training,
        "total_s": commits[-1]["time"] - began,
        "blocked_share": sum(event["blocked_s"] for event in commits) / training,
        "waited_s": sum(event["waited_s"] for event in commits),
        "commit_s": max(event["seconds"] for event in commits),
    }


def settings(folder: str, commit_every: int) -> list[str]:
    return [
        f'run.storage="{folder}"',
        f'cluster.scratch_dir="{folder}"',
        f"pretrain.steps={STEPS}",
        f"pretrain.commit_every={commit_every}",
        f"pretrain.validate_every={STEPS}",
    ]


def measure(repetitions: int) -> list[dict[str, dict[str, float]]]:
    """Pairs of runs."""
    from cluster.runtime.session import ray_session
    from configs.load import load
    from trainer.data.prepare import prepare

    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        config = load("tiny", settings(folder, STEPS))
        prepare(config, Path(folder) / "tiny", None)
        with ray_session(config.cluster, config.cluster.world_size):
            run_once(folder, STEPS)  # the first one fills the machine's caches
            for number in range(repetitions):
                order = [("with", COMMIT_EVERY), ("without", STEPS)]
                pair = {name: run_once(folder, every) for name, every in order[:: 1 if number % 2 else -1]}
                ratio = pair["with"]["training_s"] / pair["without"]["training_s"]
                print(f"  {ratio:.3f} of {pair['without']['training_s']:.1f} s", file=sys.stderr)
                pairs.append(pair)
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    pairs = measure(arguments.repetitions)
    ratios = {
        name: spread([pair["with"][f"{name}_s"] / pair["without"][f"{name}_s"] for pair in pairs])
        for name in ("training", "total")
    }
    document = {
        **setting(("ray", "torch", "deepspeed", "transformers")),
        "repetitions": arguments.repetitions,
        "steps": STEPS,
        "commit_every": COMMIT_EVERY,
        "ratios": ratios,
        "figures": {name: spreads([pair[name] for pair in pairs]) for name in ("with", "without")},
    }
    arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    for name, value in ratios.items():
        print(f"{name}: {value['median']:.3f} ({value['minimum']:.3f} to {value['maximum']:.3f})")
    for name, group in document["figures"].items():
        for part, value in group.items():
            print(f"{name} {part}: {value['median']:.3g} ({value['minimum']:.3g} to {value['maximum']:.3g})")


if __name__ == "__main__":
    main()
