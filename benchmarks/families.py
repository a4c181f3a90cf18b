"""Recurrent models and transformers of equal size on equal tokens of the demo's text: what they learn, and how fast.

Each family is trained alone on one thread, in plain PyTorch, on the same windows in the same order; the learning rate
is the best of a few for each.

python benchmarks/families.py --json FILE
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import setting

from configs.load import load
from configs.schema.pretrain import Family
from configs.schema.schema import RunConfig
from trainer.data.batches import Batches
from trainer.data.packing import VALIDATION_TOKENS, TokenFile, Windows, stored_dtype
from trainer.data.prepare import prepare
from trainer.models.families import new_model, parameter_sizes
from trainer.objectives.objective import Objective, new_objective
from trainer.pretraining.optimizers import learning_rate, new_optimizer

FAMILIES: tuple[Family, ...] = ("llama", "gpt2", "lstm", "gru", "rnn")
_SHAPE = ("model.hidden_size=96", "model.layers=2", "model.heads=4", "model.intermediate_size=256")
_MOST_APART = 0.02


def settings(*more: str) -> RunConfig:
    shared = (
        "tokenizer.vocab_size=512",
        "pretrain.batch_size=16",
        "pretrain.micro_batch_size=16",
        "cluster.world_size=1",
    )
    return load("tiny", [*shared, *_SHAPE, *more])


def parameters(config: RunConfig) -> int:
    return sum(parameter_sizes(config.model, config.tokenizer.vocab_size, config.objective))


def of_equal_size(family: Family, steps: int) -> RunConfig:
    """The family's settings whose number of parameters is nearest to the Llama's."""
    aim = parameters(settings())
    choices = [f"model.intermediate_size={size}" for size in range(256, 513, 8)]
    if family in ("rnn", "lstm", "gru"):
        choices = [f"model.hidden_size={width}" for width in range(64, 257)]
    fixed = (f"model.family={family}", f"pretrain.steps={steps}", f"pretrain.warmup_steps={max(1, steps // 20)}")
    configs = [settings(*fixed, choice) for choice in choices] if family != "llama" else [settings(*fixed)]
    best = min(configs, key=lambda config: abs(parameters(config) - aim))
    if abs(parameters(best) / aim - 1) > _MOST_APART:
        raise SystemExit(f"{family}: no settings have {aim} parameters; the nearest have {parameters(best)}")
    return best


def tensors(objective: Objective, windows: Windows) -> tuple[dict[str, torch.Tensor], int]:
    examples = objective.examples(windows)
    return {name: torch.from_numpy(array) for name, array in examples.inputs.items()}, examples.counts[0]


def train(config: RunConfig, run: Path, rate: float) -> dict[str, float]:
    """Trains one model, and validates it."""
    chosen = config.pretrain.model_copy(update={"learning_rate": rate})
    batches, objective = Batches(config, run / "corpus"), new_objective(config, run / "tokenizer")
    model = new_model(config.model, config.tokenizer.vocab_size, config.run.seed).train()
    optimizer, seconds = new_optimizer(chosen, model), []
    for step in range(chosen.steps):
        inputs, targets = tensors(objective, batches.share(step, 0, 1).windows)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(chosen, step)
        began = time.perf_counter()
        optimizer.zero_grad()
        (objective.sums(model, inputs)[0] / targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), chosen.max_grad_norm)
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    rate_of_tokens = chosen.batch_size * config.model.context_length / statistics.median(seconds)
    return {**validated(model, objective, config, run), "tokens_per_s": rate_of_tokens, "learning_rate": rate}


def validated(model: Any, objective: Objective, config: RunConfig, run: Path) -> dict[str, float]:
    """Loss in nats per token, and bits per character, of all that was held out."""
    file = TokenFile(run / "corpus" / VALIDATION_TOKENS, config.model.context_length, stored_dtype(run / "corpus"))
    everything = np.arange(file.num_windows)
    nats, targets = 0.0, 0
    with torch.no_grad():
        for part in Windows((file,) * len(everything), everything, everything, held_out=True).micro_batches(16):
            inputs, count = tensors(objective, part)
            nats, targets = nats + objective.sums(model.eval(), inputs).item(), targets + count
    counts = json.loads((run / "corpus" / "manifest.json").read_text())["metadata"]["validation"]
    loss = nats / targets
    return {"loss": loss, "bits_per_char": loss / math.log(2) * counts["tokens"] / counts["characters"]}


def measure(steps: int, rates: list[float]) -> dict[str, dict[str, float]]:
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(settings(), Path(folder))
        for family in FAMILIES:
            config = of_equal_size(family, steps)
            best = min((train(config, Path(folder), rate) for rate in rates), key=lambda found: found["loss"])
            tokens = steps * config.pretrain.batch_size * config.model.context_length
            table[family] = {
                "parameters": parameters(config),
                "hidden_size": config.model.hidden_size,
                "tokens": tokens,
            }
            table[family] |= best
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-2])
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = measure(arguments.steps, arguments.rates)
    document = {**setting(("torch", "transformers", "numpy")), "threads": 1, "families": table}
    arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    for family, found in table.items():
        print(
            f"{family:>6}: {found['parameters']:>8,} parameters, loss {found['loss']:.3f}, "
            f"{found['bits_per_char']:.3f} bits per character, {found['tokens_per_s']:,.0f} tokens/s "
            f"(learning rate {found['learning_rate']:g})"
        )


if __name__ == "__main__":
    main()
