"""Client-tasks a second in a simulation: the local grid beside plain loops and Flower's own simulation engine.

The same work for all: LoRA r=8 on a small Llama, 40 clients, 20 a round, 2 steps of 8 x 64 tokens; and once more
with no training at all, which is what the engine itself costs. Every repetition starts each engine in a process of its
own, in an order that turns; the benchmark ends with an error if they don't compute the same bytes.

python benchmarks/simulation.py --model DIRECTORY --repetitions 5 --json simulation.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import setting, spread, spreads
from workload import PEERS, environment

ENGINES = ("plain_1", "plain_2", "local_grid", "flower")
FIGURES = (
    "training_tasks_per_s",
    "training_cpu_ms_a_task",
    "empty_tasks_per_s",
    "empty_cpu_ms_a_task",
    "start_s",
    "memory_mb",
    "processes",
)
BASE = "plain_2"
# Ray's processes are nicer than others by default: on a machine that does other work, too, they would seem slower.
_ALIKE = {"RAY_worker_niceness": "0", "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


def write_work(folder: Path, arguments: argparse.Namespace) -> Path:
    """What the engines run, with the adapter that all start from."""
    sys.path.insert(0, str(PEERS))
    from simulated import warm_model

    from federated.adapters.arrays import to_bytes
    from trainer.models.adapters import adapter_weights

    weights = {name: weight.numpy() for name, weight in adapter_weights(warm_model(str(arguments.model))).items()}
    (folder / "adapter").write_bytes(to_bytes(weights))
    work = {
        "model": str(arguments.model.absolute()),
        "adapter": str(folder / "adapter"),
        "clients": arguments.clients,
        "a_round": arguments.clients_a_round,
        "rounds": arguments.rounds,
        "empty": arguments.empty_rounds,
    }
    (folder / "work.json").write_text(json.dumps(work))
    return folder / "work.json"


def run(engine: str, work: Path) -> dict[str, Any]:
    """An engine's figures, from a process of its own."""
    record = work.with_name(f"{engine}.json")
    done = subprocess.run(
        [sys.executable, str(PEERS / "simulated.py"), engine, str(work), str(record)],
        env={**environment(), **_ALIKE},
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{engine} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    figures: dict[str, Any] = json.loads(record.read_text())
    return figures


def check_same(results: dict[str, dict[str, Any]]) -> None:
    """Ends the benchmark unless every engine has computed the same adapter."""
    for name in ("training_digest", "empty_digest"):
        digests = {engine: figures[name] for engine, figures in results.items()}
        if len(set(digests.values())) != 1:
            raise SystemExit(f"not the same work: {name} {digests}")


def ratios(repetitions: Sequence[dict[str, dict[str, Any]]], figure: str) -> dict[str, dict[str, float]]:
    """Every engine's figure over that of the plain loop in two processes, inside a repetition."""
    return {
        engine: spread([results[engine][figure] / results[BASE][figure] for results in repetitions])
        for engine in repetitions[0]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a small Llama in Hugging Face's format")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--clients", type=int, default=40)
    parser.add_argument("--clients-a-round", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5, help="with training, after one that warms up")
    parser.add_argument("--empty-rounds", type=int, default=30, help="without, after one that warms up")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    repetitions: list[dict[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as folder:
        work = write_work(Path(folder), arguments)
        for number in range(arguments.repetitions):
            first = number % len(arguments.engines)
            results = {}
            for engine in [*arguments.engines[first:], *arguments.engines[:first]]:
                results[engine] = run(engine, work)
                shown = ", ".join(f"{name} {results[engine][name]:.1f}" for name in FIGURES)
                print(f"{number + 1}: {engine}: {shown}; load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
            check_same(results)
            repetitions.append(results)
    document: dict[str, Any] = {
        **setting(("flwr", "ray", "torch", "transformers", "peft")),
        "work": {name: getattr(arguments, name) for name in ("clients", "clients_a_round", "rounds", "empty_rounds")},
        "repetitions": len(repetitions),
        "figures": {
            engine: spreads([{name: results[engine][name] for name in FIGURES} for results in repetitions])
            for engine in arguments.engines
        },
    }
    if BASE in arguments.engines:
        document["ratio"] = {name: ratios(repetitions, name) for name in FIGURES if name.endswith("tasks_per_s")}
    arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
