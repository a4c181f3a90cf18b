"""What commits cost: pretraining with a commit every 50 steps against the same without.

python benchmarks/commits.py --repetitions 5 --json commits.json

The tiny model on two ranks of this machine, measured in two ways:

- ``windows``: inside one run with a commit every 50 steps, the 25 steps that begin with a commit, its copy under way
  among them, against the 25 that follow and have none. The wall time of 50 steps with a commit over that of 50 without,
  for every commit: pairs of a second or two, so that other work on the machine hits both.
- ``training`` and ``total``: whole runs of 400 steps, with a commit every 50 and with one at the end, one after the
  other, in turns first; from the first step to the last commit, or from the start. For a quiet machine.

``blocked_share`` is the share of the time in which rank 0 stood still for commits, by its own clock.
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
WINDOW_STEPS = 1600


def events_of(folder: str, steps: int, commit_every: int) -> tuple[float, list[dict[str, Any]]]:
    """When a gang started, and the events of one pretraining from its first step, in a Ray that is there."""
    from cluster.runtime.gang import run_gang
    from configs.load import load

    events: list[dict[str, Any]] = []
    shutil.rmtree(Path(folder) / "tiny" / "pretrain", ignore_errors=True)
    began = time.time()
    run_gang(load("tiny", settings(folder, steps, commit_every)), Path(folder) / "tiny", events.append)
    committed = [event["step"] for event in events if event["event"] == "commit"]
    assert committed == list(range(commit_every, steps + 1, commit_every)), committed
    return began, events


def settings(folder: str, steps: int, commit_every: int) -> list[str]:
    return [
        f'run.storage="{folder}"',
        f'cluster.scratch_dir="{folder}"',
        f"pretrain.steps={steps}",
        f"pretrain.commit_every={commit_every}",
        f"pretrain.validate_every={steps}",
    ]


def windows(folder: str) -> dict[str, Any]:
    """One long run, window by window."""
    _, events = events_of(folder, WINDOW_STEPS, COMMIT_EVERY)
    times = {event["step"]: event["time"] for event in events if event["event"] == "step"}
    commits = [event for event in events if event["event"] == "commit"][:-1]
    half, ratios = COMMIT_EVERY // 2, []
    for commit in commits:
        start = commit["step"]
        with_commit = times[start + half] - times[start]
        without = times[start + 2 * half] - times[start + half]
        ratios.append((with_commit + without) / (2 * without))
    trained = times[WINDOW_STEPS] - times[COMMIT_EVERY]
    ratios.sort()
    quartile = len(ratios) // 4
    return {
        "windows": len(ratios),
        "ratio": {**spread(ratios), "quartiles": [ratios[quartile], ratios[-1 - quartile]]},
        "blocked_share": sum(commit["blocked_s"] for commit in commits) / trained,
        "blocked_s": spread([commit["blocked_s"] for commit in commits]),
        "waited_s": spread([commit["waited_s"] for commit in commits]),
        "seconds": spread([commit["seconds"] for commit in commits]),
        "step_s": trained / (WINDOW_STEPS - COMMIT_EVERY),
    }


def whole_run(folder: str, commit_every: int) -> dict[str, float]:
    """One run from its start to its last commit."""
    began, events = events_of(folder, STEPS, commit_every)
    first = next(event["time"] for event in events if event["event"] == "step")
    commits = [event for event in events if event["event"] == "commit"]
    training = commits[-1]["time"] - first
    blocked = sum(event["blocked_s"] for event in commits) / training
    return {"training_s": training, "total_s": commits[-1]["time"] - began, "blocked_share": blocked}


def measure(repetitions: int) -> dict[str, Any]:
    """The windows of one run, and pairs of whole runs."""
    from cluster.runtime.session import ray_session
    from configs.load import load
    from trainer.data.prepare import prepare

    with tempfile.TemporaryDirectory() as folder:
        config = load("tiny", settings(folder, STEPS, STEPS))
        prepare(config, Path(folder) / "tiny", None)
        with ray_session(config.cluster, config.cluster.world_size):
            found: dict[str, Any] = {"windows": windows(folder)}
            pairs = []
            for number in range(repetitions):
                order = [("with", COMMIT_EVERY), ("without", STEPS)]
                pair = {name: whole_run(folder, every) for name, every in order[:: 1 if number % 2 else -1]}
                ratio = pair["with"]["training_s"] / pair["without"]["training_s"]
                print(f"  {ratio:.3f} of {pair['without']['training_s']:.1f} s", file=sys.stderr)
                pairs.append(pair)
    for name in ("training", "total") if pairs else ():
        found[name] = spread([pair["with"][f"{name}_s"] / pair["without"][f"{name}_s"] for pair in pairs])
    for name in ("with", "without") if pairs else ():
        found[name] = spreads([pair[name] for pair in pairs])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5, help="pairs of whole runs; 0 for the windows only")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    document = {
        **setting(("ray", "torch", "deepspeed", "transformers")),
        "repetitions": arguments.repetitions,
        "commit_every": COMMIT_EVERY,
        "figures": measure(arguments.repetitions),
    }
    arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document["figures"], indent=2))


if __name__ == "__main__":
    main()
