"""What `siloweave demo` takes and reaches: seconds by stage, bits per character, epsilon. No peer: it is our main job.

python benchmarks/demo.py --repetitions 3 --json demo.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import setting, spreads

FIGURES = {
    "bits_per_char_base": ("federated", "bits_per_char_base"),
    "bits_per_char_dp": ("federated", "bits_per_char_dp"),
    "bits_per_char_no_dp": ("federated", "bits_per_char_no_dp"),
    "improvement_dp": ("federated", "improvement_dp"),
    "bytes_per_round": ("federated", "bytes_per_round"),
    "epsilon": ("privacy", "epsilon"),
    "pretrain_tokens_per_s": ("pretrain", "tokens_per_s"),
    "validation_bits_per_char": ("pretrain", "validation_bits_per_char"),
}


def one_demo(config: str) -> tuple[dict[str, float], dict[str, str]]:
    """Runs the demo in a folder of its own, with fresh ledgers."""
    command = [str(Path(sys.executable).with_name("siloweave")), "demo", "-c", config, "--json"]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "XDG_STATE_HOME": folder}
        began = time.perf_counter()
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        total = time.perf_counter() - began
    if done.returncode:
        sys.exit(done.stderr)
    report = json.loads(done.stdout)
    figures = {name: report[group][key] for name, (group, key) in FIGURES.items()}
    seconds = {f"seconds_{stage}": value for stage, value in report["seconds"].items()}
    return {**figures, **seconds, "seconds_total": total}, report["versions"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="demo")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    runs = []
    for number in range(arguments.repetitions):
        figures, versions = one_demo(arguments.config)
        runs.append(figures)
        print(f"{number + 1}/{arguments.repetitions}: {figures['seconds_total']:.0f} s", file=sys.stderr)
    summary = spreads(runs)
    document = {
        **setting(()),
        "versions": versions,
        "repetitions": arguments.repetitions,
        "figures": summary,
    }
    arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    for name, value in summary.items():
        print(f"{name}: {value['median']:.4g} ({value['minimum']:.4g} to {value['maximum']:.4g})")


if __name__ == "__main__":
    main()
