"""Seconds and bytes of a round as `federation rehearse` predicts them, beside those of the rounds that follow.

python benchmarks/rehearse.py --model runs/tiny/model --steps 2 10 --repetitions 3 --json rehearse.json
python benchmarks/rehearse.py --model runs/tiny/model --faults --json faults.json

SuperLink and nginx on loopback, two relays and two silo services, as `round_latency.py` has them. Each run is the one
that was rehearsed right before, with the same settings; rehearsals and runs alternate. With `--faults` there are
thirteen sites (`rehearsal_faults.py`).
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from figures import setting, spread
from rehearsal_faults import measured as with_faults
from round_latency import SILOS, FederationFolder


class Federation(FederationFolder):
    """Ours alone."""

    def serve_stock(self) -> None:
        """Nothing stands beside it."""

    def given(self, name: str, rounds: int, steps: int) -> list[str]:
        """The run's settings, as a command takes them."""
        overrides = {
            "run.name": name,
            "run.storage": str(self.root / "runs"),
            "federated.rounds": rounds,
            "federated.local_steps": steps,
            "privacy.epsilon": 1,
            "federated.min_silos": len(SILOS),
        }
        return ["-c", "tiny", *(part for key, value in overrides.items() for part in ("--set", f"{key}={value}"))]

    def rehearsed(self, given: list[str]) -> tuple[dict[str, Any], float]:
        """What a rehearsal says, and the seconds that its command took."""
        command = ["federation", "rehearse", str(self.folder), *given, "--json"]
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "siloweave", *command],
            env=self.environment,
            cwd=self.root,
            capture_output=True,
            text=True,
            check=False,
        )
        found = json.loads(done.stdout)
        if not found.get("round", {}).get("seconds"):
            raise SystemExit(f"no prediction: {done.stdout}\n{done.stderr}")
        return found, time.perf_counter() - began

    def measured(self, name: str, given: list[str]) -> list[dict[str, float]]:
        """The rounds of a run."""
        self.call("federation", "run", str(self.folder), *given)
        events = [json.loads(line) for line in (self.root / "runs" / name / "federated" / "events.jsonl").open()]
        return [event for event in events if event["event"] == "round"]

    def compared(self, name: str, rounds: int, steps: int) -> dict[str, Any]:
        """One rehearsal, and the run after it."""
        given = self.given(name, rounds, steps)
        shutil.copytree(self.model, self.root / "runs" / name / "model")
        found, took_s = self.rehearsed(given)
        events = self.measured(name, given)
        seconds = spread([event["seconds"] for event in events])
        moved = spread([event["bytes"] for event in events])
        return {
            "seconds of the rehearsal": took_s,
            "sites": {name: site["round"] for name, site in found["sites"].items()},
            "predicted": {"round": found["round"], "run": found["run"]},
            "measured": {"seconds": seconds, "bytes": moved, "all rounds": sum(event["seconds"] for event in events)},
            "predicted over measured": {
                "seconds": found["round"]["seconds"] / seconds["median"],
                "bytes": found["round"]["bytes"] / moved["median"],
                "all rounds": found["run"]["seconds"] / sum(event["seconds"] for event in events),
            },
        }


def accuracy(root: Path, model: Path, rounds: int, steps: list[int], repetitions: int) -> dict[str, Any]:
    """Predictions beside what was measured, of one base model; those of each number of steps in turns."""
    federation = Federation(root, model)
    found: dict[str, list[dict[str, Any]]] = {f"{one} steps": [] for one in steps}
    try:
        for number in range(repetitions):
            for one in steps:
                found[f"{one} steps"].append(federation.compared(f"run-{one}-{number}", rounds, one))
                print(f"{model}: {one} steps: {found[f'{one} steps'][-1]['predicted over measured']}", file=sys.stderr)
    finally:
        federation.end()
    ratios = {name: [one["predicted over measured"]["seconds"] for one in runs] for name, runs in found.items()}
    return {"predicted over measured": {name: spread(values) for name, values in ratios.items()}, "runs": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="exported models, as runs/tiny/model")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, nargs="+", default=[2])
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--faults", action="store_true", help="twelve faults at once instead, with the first model")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = setting(["siloweave", "flwr", "torch"])
    for number, model in enumerate(options.model):
        root = Path(tempfile.mkdtemp(prefix="rehearse-"))
        if options.faults:
            result["faults"] = with_faults(root, model.absolute())
        else:
            of_model = accuracy(root, model, options.rounds, options.steps, options.repetitions)
            result[f"model {number + 1}"] = {"parameters_bytes": _bytes(model), "rounds": options.rounds, **of_model}
        shutil.rmtree(root)
        if options.faults:
            break
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


def _bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


if __name__ == "__main__":
    main()
