"""A silo's memory as `siloweave plan --memory` says it, beside the peak of a silo's real process in a simulation.

Each case in a process of its own: the model is imported, the trial made, and one round of two private steps taken by a
real silo over the local grid, on 200 records that fill the context. Peaks are VmHWM.

python benchmarks/step_memory.py --stories FOLDER --minilm FOLDER --smollm2 FILE.gguf --json step_memory.json
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
from figures import setting
from server_memory import _peak_mb
from workload import environment

MB = 2**20
RECORDS = 200
LABELS = 'federated.labels=["north wind","south wind"]'
CLASSIFY = ('federated.task="classification"', 'federated.pooling="mean"', LABELS)
CASES = {
    "stories, LoRA": ("stories", 64, ()),
    "MiniLM, classification, LoRA": ("minilm", 128, CLASSIFY),
    "MiniLM, classification, head": ("minilm", 128, (*CLASSIFY, 'federated.train="head"')),
    "MiniLM, classification, all of it": ("minilm", 128, (*CLASSIFY, 'federated.train="full"')),
    "SmolLM2-135M, LoRA": ("smollm2", 128, ()),
}


def settings_of(case: str, source: str, folder: Path) -> list[str]:
    """The run's settings, and the silo's records that they name."""
    _, context, own = CASES[case]
    chance = random.Random(0)
    words = [
        "the",
        "ship",
        "sails",
        "north",
        "and",
        "old",
        "men",
        "tell",
        "of",
        "wind",
        "and",
        "rain",
        "in",
        "every",
        "harbour",
    ]
    rows = [
        {"silo": "harbour", "text": " ".join(chance.choices(words, k=2 * context)), "label": f"{side} wind"}
        for side in ("north", "south")
        for _ in range(RECORDS // 2)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f'model.source="{source}"',
        f"model.context_length={context}",
        f'run.storage="{folder}"',
        f'federated.state_dir="{folder / "state"}"',
        f'data.private.source="{folder / "rows.jsonl"}"',
        f"data.private.public_record_count={RECORDS}",
        "data.private.public_record_counts={}",
        "privacy.sampling_rate=0.1",
        "federated.rounds=1",
        "federated.workers=1",
        *own,
    ]


def measure(case: str, source: str, folder: Path) -> dict[str, Any]:
    """What is said, and what a silo's process then takes."""
    from cluster.checks.step_memory import step_memory
    from cluster.runtime.session import ray_session
    from configs.load import load
    from configs.run_directory import run_directory
    from configs.storage.layout import RunFiles
    from federated.simulation.simulation import simulate
    from privacy.declaration import DECLARATION, declare
    from privacy.plan_from_settings import plan_terms
    from privacy.signing import Signer
    from trainer.imported import import_model

    config, peaks = load("tiny", settings_of(case, source, folder)), list[float]()
    signer = Signer(folder / "key")
    import_model(config, run_directory(config), lambda facts: declare(facts, signer).encode(), DECLARATION)
    said = step_memory(config, plan_terms(config))

    def look(event: dict[str, Any]) -> None:
        if event["event"] == "round":
            peaks.extend(_peak_mb(process) for process in psutil.Process().children(recursive=True))

    with ray_session(config.cluster, 1) as ray:
        simulate(ray, config, RunFiles(run_directory(config)).model, folder / "federation", on_event=look)
    said_mb, measured_mb = said["peak_bytes"] / MB, max(peaks)
    return {
        "said_mb": said_mb,
        "measured_mb": measured_mb,
        "said_over_measured": said_mb / measured_mb,
        "trial_seconds": said["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in dict.fromkeys(model for model, _, _ in CASES.values()):
        parser.add_argument(f"--{name}", type=Path, help="its cases are left out without it")
    parser.add_argument("--case", choices=CASES, help="measures this one, in this process")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    given = {case: getattr(arguments, model) for case, (model, _, _) in CASES.items() if getattr(arguments, model)}
    if arguments.case:
        path = given[arguments.case].absolute()
        with tempfile.TemporaryDirectory() as folder:
            source = str(path) if path.is_dir() else f"gguf:{path}"
            print(json.dumps(measure(arguments.case, source, Path(folder))))
        return
    figures = {}
    for case, path in given.items():
        command = [sys.executable, __file__, f"--{CASES[case][0]}", str(path), "--case", case]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=3600, check=False)
        if done.returncode:
            raise SystemExit(f"{case} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
        figures[case] = json.loads(done.stdout.splitlines()[-1])
        print(case, figures[case], flush=True)
    if arguments.json:
        document = {**setting(("torch", "transformers", "peft", "ray")), "records": RECORDS, "figures": figures}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
