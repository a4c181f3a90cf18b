"""Tokens a second of pretraining in steady state: Siloweave's gang beside three peers that do the same work.

python benchmarks/pretrain.py --repetitions 5 --json pretrain.json

The same Llama of 4.2 million parameters, windows, optimizer and DeepSpeed ZeRO-2 settings, on two ranks with one thread
each: a plain loop under torchrun, Hugging Face Trainer, and the plain loop on Ray Train (``peers/``). Each reports the
global loss of every step, and these must agree, so that all are known to do the same work. A repetition runs each once,
in an order that turns; a ratio compares two of one repetition. Time runs from the warm-up's last step to the last one.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from figures import setting, spread
from workload import SMALL, Workload, steps_of

NAMES = ("siloweave", "torchrun", "hf_trainer", "ray_train")
LARGEST_DIFFERENCE = 1e-4


def measure(workload: Workload, name: str, warmup: int) -> tuple[float, list[float]]:
    """Tokens a second, and the loss of every step."""
    _, lines = workload.run(name)
    steps = steps_of(lines)
    losses = [steps[step]["loss"] for step in range(1, workload.steps + 1)]
    seconds = steps[workload.steps]["time"] - steps[warmup]["time"]
    return workload.tokens_per_step * (workload.steps - warmup) / seconds, losses


def same_losses(losses: dict[str, list[float]]) -> float:
    """The largest relative difference to torchrun's, which must be small: else the peers don't do the same work."""
    worst = max(
        (abs(mine - theirs) / theirs, name, step + 1)
        for name, values in losses.items()
        for step, (mine, theirs) in enumerate(zip(values, losses["torchrun"], strict=True))
    )
    if worst[0] > LARGEST_DIFFERENCE:
        raise SystemExit(f"{worst[1]} does other work: its loss at step {worst[2]} is off by {worst[0]:.2g}")
    return worst[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="steps of every run, the warm-up's included")
    parser.add_argument("--warmup", type=int, default=10, help="steps before the time is taken")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    runs: list[dict[str, float]] = []
    differences: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        workload = Workload(Path(folder), "tiny", SMALL, arguments.steps)
        for repetition in range(arguments.repetitions):
            turn = repetition % len(NAMES)
            results: dict[str, Any] = {}
            for name in (*NAMES[turn:], *NAMES[:turn]):
                results[name] = measure(workload, name, arguments.warmup)
                print(f"{repetition + 1}: {name} {results[name][0]:,.0f} tokens/s", file=sys.stderr, flush=True)
            differences.append(same_losses({name: losses for name, (_, losses) in results.items()}))
            runs.append({name: rate for name, (rate, _) in results.items()})
    peers = [name for name in NAMES if name != "siloweave"]
    ratios = {peer: [run["siloweave"] / run[peer] for run in runs] for peer in peers}
    document = {
        **setting(("ray", "torch", "deepspeed", "transformers", "accelerate")),
        "repetitions": arguments.repetitions,
        "steps": arguments.steps - arguments.warmup,
        "largest_loss_difference": max(differences),
        "tokens_per_s": {name: spread([run[name] for run in runs]) for name in NAMES},
        "ratio": {peer: {**spread(values), "values": values} for peer, values in ratios.items()},
    }
    arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    for name in NAMES:
        rate = document["tokens_per_s"][name]
        print(f"{name}: {rate['median']:,.0f} tokens/s ({rate['minimum']:,.0f} to {rate['maximum']:,.0f})")
    for peer in peers:
        ratio = document["ratio"][peer]
        print(f"siloweave / {peer}: {ratio['median']:.3f} ({ratio['minimum']:.3f} to {ratio['maximum']:.3f})")
    print(f"losses agree to {document['largest_loss_difference']:.1g}")


if __name__ == "__main__":
    main()
