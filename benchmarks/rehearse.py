"""Seconds and bytes of a round as `federation rehearse` predicts them, beside those of the rounds that follow.

python benchmarks/rehearse.py --model runs/tiny/model --json rehearse.json

SuperLink and nginx on loopback, two relays and two silo services, as `round_latency.py` has them. The run is the one
that was rehearsed, with the same settings.
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
from round_latency import SILOS, FederationFolder


class Federation(FederationFolder):
    """Ours alone."""

    def serve_stock(self) -> None:
        """Nothing stands beside it."""

    def given(self, rounds: int, steps: int) -> list[str]:
        """The run's settings, as a command takes them."""
        overrides = {
            "run.name": "run",
            "run.storage": str(self.root / "runs"),
            "federated.rounds": rounds,
            "federated.local_steps": steps,
            "privacy.epsilon": 1,
            "federated.min_silos": len(SILOS),
        }
        return ["-c", "tiny", *(part for key, value in overrides.items() for part in ("--set", f"{key}={value}"))]

    def rehearsed(self, rounds: int, steps: int) -> tuple[dict[str, Any], float]:
        """What a rehearsal says, and the seconds that its command took."""
        command = ["federation", "rehearse", str(self.folder), *self.given(rounds, steps), "--json"]
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

    def measured(self, rounds: int, steps: int) -> list[dict[str, float]]:
        """The rounds of a run."""
        self.call("federation", "run", str(self.folder), *self.given(rounds, steps))
        events = [json.loads(line) for line in (self.root / "runs" / "run" / "federated" / "events.jsonl").open()]
        return [event for event in events if event["event"] == "round"]

    def in_silo(self, name: str) -> list[float]:
        """Seconds from a round's request that was accepted to its reply's departure."""
        lines = [json.loads(line) for line in (self.root / name / "state" / "audit.jsonl").open()]
        asked = {line["request_digest"]: line["time"] for line in lines if line.get("kind") == "train"}
        left = {line["request_digest"]: line["time"] for line in lines if line["direction"] == "out"}
        return [left[digest] - time for digest, time in asked.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="an exported model, as runs/tiny/model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="rehearse-"))
    federation = Federation(root, options.model)
    try:
        shutil.copytree(federation.model, root / "runs" / "run" / "model")
        found, took_s = federation.rehearsed(options.rounds, options.steps)
        rounds = federation.measured(options.rounds, options.steps)
        in_silo = {name: spread(federation.in_silo(name)) for name in SILOS}
    finally:
        federation.end()
    seconds, moved = (spread([event[name] for event in rounds]) for name in ("seconds", "bytes"))
    result: dict[str, Any] = {
        **setting(["siloweave", "flwr", "torch"]),
        "rounds": options.rounds,
        "steps": options.steps,
        "seconds_of_the_rehearsal": took_s,
        "sites": {name: site["round"] for name, site in found["sites"].items()},
        "predicted": found["round"],
        "measured": {"seconds": seconds, "bytes": moved, "seconds in the silo": in_silo},
        "predicted_over_measured": {
            "seconds": found["round"]["seconds"] / seconds["median"],
            "bytes": found["round"]["bytes"] / moved["median"],
        },
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
