"""What a federation learns of a task, with DP and without: beside a guess, each silo alone, and all data in one place.

Base models and data lie where you say. The silos' steps and the aggregation are the product's own, without what carries
them. Which model a task is measured with is your choice; docs/tasks.md has ours.

python benchmarks/tasks.py --model MINILM --data FOLDER --task sentiment --seeds 0 1 2 --json tasks.json
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from figures import setting, spreads
from task_data import SETTINGS, Setting, Unit, silos, task_of
from torch.nn.functional import pad
from transformers.modeling_outputs import BaseModelOutput

from configs.schema.federated import FederatedSettings
from federated.adapters.arrays import Arrays
from federated.adapters.warm_model import adaptation, put_on
from federated.aggregation.aggregation import RoundAggregation
from federated.silo.local_training import LocalSettings, PrivateUpdate, plain_update
from privacy.mechanism.streams import SEED_BYTES, Streams
from privacy.plan import PlanTerms, PrivacyPlan
from trainer.models.adapters import adapted, adapter_weights
from trainer.models.load import load_model
from trainer.scoring.score import score

LIBRARIES = ("siloweave", "torch", "transformers", "peft", "opacus", "numpy")
DELTA = 1e-5


class BodyOnce(torch.nn.Module):
    """A frozen body that reads a text once, whoever asks again: the same figures, and no seconds worth telling."""

    read: ClassVar[dict[tuple[int, ...], torch.Tensor]] = {}  # by the one body of a process, whatever the seed

    def __init__(self, body: torch.nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> BaseModelOutput:
        """Last hidden states (B, T, D), zero where a text is padded."""
        lengths = attention_mask.sum(dim=1).tolist()
        rows = [self.hidden(tuple(ids[:length].tolist())) for ids, length in zip(input_ids, lengths, strict=True)]
        return BaseModelOutput(torch.stack([pad(row, (0, 0, 0, input_ids.shape[1] - len(row))) for row in rows]))

    def hidden(self, text: tuple[int, ...]) -> torch.Tensor:
        """(T, D) of a text alone."""
        if text not in self.read:
            with torch.no_grad():
                self.read[text] = self.body(torch.tensor([text]), torch.ones(1, len(text))).last_hidden_state[0]
        return self.read[text]


def plan(used: Setting, epsilon: float) -> PrivacyPlan:
    terms = PlanTerms(
        sampling_rate=used.sampling_rate,
        max_grad_norm=used.norm,
        noise_multiplier=1.0,
        rounds=used.rounds,
        steps_per_round=used.steps,
        delta=DELTA,
    )
    return terms.calibrated(epsilon).bind(used.records)


class Runs:
    """All runs of one task and seed."""

    def __init__(self, arguments: argparse.Namespace, name: str, seed: int) -> None:
        chosen = {key: getattr(arguments, key) for key in ("train", "rank", "rate") if getattr(arguments, key)}
        self.used, self.seed, self.data = replace(SETTINGS[name], **chosen), seed, arguments.data
        where = (arguments.model, arguments.data, name)
        self.task, self.silos, spec = task_of(*where), silos(*where), self.used.spec(arguments.data)
        self.settings = FederatedSettings(
            task=spec.name,
            labels=spec.labels,
            pooling=spec.pooling,
            template=spec.template,
            train=self.used.train,
            adapter_targets=self.used.targets or "all-linear",
            lora_rank=self.used.rank,
            lora_alpha=2.0 * self.used.rank,
        )
        head = self.task.head
        self.model = adapted(load_model(arguments.model, head=head), adaptation(self.settings, head), 0)
        if arguments.body_once:
            setattr(
                self.model, self.model.base_model_prefix, BodyOnce(getattr(self.model, self.model.base_model_prefix))
            )
        fresh = adapted(load_model(arguments.model, head=head), adaptation(self.settings, head), seed)
        self.start = {name: value.numpy() for name, value in adapter_weights(fresh).items()}
        self.travelled = 0

    def figures(self, adapter: Arrays) -> dict[str, float]:
        """The task's figures over all silos' held-out records."""
        put_on(self.model, adapter)
        found = [score(self.model.eval(), self.task, held_out, 16) for _, held_out in self.silos.values()]
        return {name: value for name, value in sum(found[1:], found[0]).figures.items() if isinstance(value, float)}

    def local(self) -> LocalSettings:
        return LocalSettings(self.used.rate, "adam", 16, "bookkeeping")

    def plain(self, adapter: Arrays, units: list[Unit], steps: int, number: int) -> Arrays:
        """Ordinary steps on Poisson batches of the size that the plan expects, of one example of each unit."""
        chance = np.random.default_rng((self.seed, number))
        expected = self.used.sampling_rate * self.used.records
        batches = [
            [
                units[index][chance.integers(len(units[index]))]
                for index in np.flatnonzero(chance.random(len(units)) < expected / len(units))
            ]
            for _ in range(steps)
        ]
        return plain_update(batches, expected, self.model, self.task, adapter, self.local())

    def private(self, adapter: Arrays, units: list[Unit], silo: str, number: int, epsilon: float) -> Arrays:
        digest = hashlib.sha256(f"{self.seed}/{silo}/{number}".encode()).hexdigest()
        update = PrivateUpdate(plan(self.used, epsilon), self.model, self.task, adapter, self.local())
        return update.run(Streams(os.urandom(SEED_BYTES), digest), units)

    def federated(self, epsilon: float | None) -> dict[str, float]:
        adapter, state = self.start, dict[str, Any]()
        for number in range(self.used.rounds):
            aggregation = RoundAggregation(self.settings, adapter, state, len(self.silos))
            for place, (silo, (units, _)) in enumerate(self.silos.items()):
                sent = aggregation.sent(silo).adapter
                if epsilon is None:
                    update = self.plain(sent, units, self.used.steps, 100 * number + place)
                else:
                    update = self.private(sent, units, silo, number, epsilon)
                self.travelled += sum(array.nbytes for arrays in (sent, update) for array in arrays.values())
                aggregation.add(silo, update)
            adapter, state = aggregation.result()
        return self.figures(adapter)

    def guess(self) -> dict[str, float]:
        """The label that is most frequent in training, for all; where there are no labels, the model as it comes."""
        counts = Counter(unit[0].target for units, _ in self.silos.values() for unit in units)
        if self.used.task != "classification" or self.used.pooling == "likelihood":
            return self.figures(self.start)
        ((most, _),) = counts.most_common(1)
        held_out = [example.target == most for _, held_out in self.silos.values() for example in held_out]
        return {self.task.measures.main: float(np.mean(held_out))}

    def alone(self) -> dict[str, float]:
        """Each silo trains by itself, as many steps as in the federation, and is asked about all silos' records."""
        found = [self.trained_on(units, 1000 + place) for place, (units, _) in enumerate(self.silos.values())]
        return {name: float(np.mean([one[name] for one in found])) for name in found[0]}

    def centralised(self) -> dict[str, float]:
        return self.trained_on([unit for units, _ in self.silos.values() for unit in units], 2000)

    def trained_on(self, units: list[Unit], number: int) -> dict[str, float]:
        """Figures after as many ordinary steps on these units as all rounds have together."""
        update = self.plain(self.start, units, self.used.rounds * self.used.steps, number)
        return self.figures({name: value + update[name] for name, value in self.start.items()})

    def all(self) -> dict[str, Callable[[], dict[str, float]]]:
        return {
            "a guess": self.guess,
            "federated": lambda: self.federated(None),
            "federated, epsilon 8": lambda: self.federated(8.0),
            "federated, epsilon 3": lambda: self.federated(3.0),
            "centralised": self.centralised,
            "each silo alone": self.alone,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the folder of a model with its tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="folder of the datasets")
    parser.add_argument("--task", choices=SETTINGS, required=True)
    parser.add_argument("--only", nargs="+", help="of the runs, by name")
    parser.add_argument("--train", choices=("lora", "full", "head", "bitfit"), help="other than the task has it")
    parser.add_argument("--rank", type=int, help="the same")
    parser.add_argument("--rate", type=float, help="the same")
    parser.add_argument("--body-once", action="store_true", help="with --train head: fewer seconds, which are left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs: dict[str, list[dict[str, float]]] = defaultdict(list)
    document = {**setting(LIBRARIES), "task": arguments.task}
    for seed in arguments.seeds:  # all runs of a seed before the next: a table of fewer seeds is whole, too
        done = Runs(arguments, arguments.task, seed)
        for name, run in done.all().items():
            if arguments.only and name not in arguments.only:
                continue
            began, done.travelled = time.perf_counter(), 0
            found = {**run(), "megabytes": done.travelled / 1e6}
            if not arguments.body_once:
                found["seconds"] = time.perf_counter() - began
            runs[name].append(found)
            print(f"seed {seed}, {name}: {found}", file=sys.stderr, flush=True)
        document["settings"] = {name: value for name, value in vars(done.used).items() if not callable(value)}
        document["seeds"] = arguments.seeds[: arguments.seeds.index(seed) + 1]
        document["silos"] = {name: [len(part) for part in parts] for name, parts in done.silos.items()}
        document["runs"] = {
            name: {**spreads(found), "mean": {key: float(np.mean([run[key] for run in found])) for key in found[0]}}
            for name, found in runs.items()
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    main_figure = done.task.measures.main
    for name, figures in document["runs"].items():
        shown = figures[main_figure]
        print(f"{name}: {main_figure} {shown['median']:.3f} ({shown['minimum']:.3f} to {shown['maximum']:.3f})")


if __name__ == "__main__":
    main()
