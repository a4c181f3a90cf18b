"""Recurrent models and transformers of equal size on equal tokens of the demo's text: what they learn, and how fast.

Each family is trained alone on one thread, in plain PyTorch, on the same windows in the same order; the learning rate
is the better one of two for each. Speeds are measured afterwards, in turns.

python benchmarks/families.py --json FILE
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import setting, spread

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
_TURNS, _STEPS_A_TURN = 5, 4


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


class Training:
    """One model on its way through the data.

    Args:
        config: its settings.
        run: directory of the prepared corpus.
        rate: peak learning rate.
    """

    def __init__(self, config: RunConfig, run: Path, rate: float) -> None:
        self.config, self._settings = config, config.pretrain.model_copy(update={"learning_rate": rate})
        self._batches, self.objective = Batches(config, run / "corpus"), new_objective(config, run / "tokenizer")
        self.model = new_model(config.model, config.tokenizer.vocab_size, config.run.seed).train()
        self._optimizer = new_optimizer(self._settings, self.model)

    def step(self, number: int) -> None:
        inputs, targets = tensors(self.objective, self._batches.share(number, 0, 1).windows)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._settings, number)
        self._optimizer.zero_grad()
        (self.objective.sums(self.model, inputs)[0] / targets).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._settings.max_grad_norm)
        self._optimizer.step()


def train(config: RunConfig, run: Path, rate: float) -> dict[str, float]:
    """Trains one model, and validates it."""
    training = Training(config, run, rate)
    for step in range(config.pretrain.steps):
        training.step(step)
    return {**validated(training.model, training.objective, config, run), "learning_rate": rate}


def speeds(configs: dict[Family, RunConfig], run: Path) -> dict[Family, dict[str, float]]:
    """Tokens per second of each, in turns, so that what else the machine does slows all of them alike."""
    trainings = {family: Training(config, run, 1e-3) for family, config in configs.items()}
    found: dict[Family, list[float]] = {family: [] for family in configs}
    for turn in range(1 + _TURNS):
        for family, training in trainings.items():
            began = time.perf_counter()
            for step in range(_STEPS_A_TURN):
                training.step(step)
            tokens = _STEPS_A_TURN * training.config.pretrain.batch_size * training.config.model.context_length
            if turn:  # the first one warms up
                found[family].append(tokens / (time.perf_counter() - began))
    return {family: spread(rates) for family, rates in found.items()}


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


def measure(steps: int, rates: list[float]) -> dict[Family, dict[str, Any]]:
    table: dict[Family, dict[str, Any]] = {}
    configs = {family: of_equal_size(family, steps) for family in FAMILIES}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        prepare(settings(), run)
        for family, config in configs.items():
            best = min((train(config, run, rate) for rate in rates), key=lambda found: found["loss"])
            tokens = steps * config.pretrain.batch_size * config.model.context_length
            size = {"parameters": parameters(config), "hidden_size": config.model.hidden_size}
            table[family] = {**size, "tokens": tokens, **best}
        for family, rate in speeds(configs, run).items():
            table[family]["tokens_per_s"] = rate
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 1e-2])
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = measure(arguments.steps, arguments.rates)
    document = {**setting(("torch", "transformers", "numpy")), "threads": 1, "families": table}
    arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    for family, found in table.items():
        print(
            f"{family:>6}: {found['parameters']:>8,} parameters, loss {found['loss']:.3f}, "
            f"{found['bits_per_char']:.3f} bits per character, {found['tokens_per_s']['median']:,.0f} tokens/s "
            f"(learning rate {found['learning_rate']:g})"
        )


if __name__ == "__main__":
    main()
