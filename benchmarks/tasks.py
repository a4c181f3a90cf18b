"""What a federation learns of labels, with DP and without: beside a guess, each silo alone, and all data in one place.

Base models and data lie where you say. The silos' steps and the aggregation are the product's own, without what carries
them. ``sentiment``: snippets of four domains, which are the silos. ``intent``: 150 classes, five silos by a hash.

python benchmarks/tasks.py --model MINILM --data FOLDER --task sentiment --seeds 0 1 2 --json tasks.json
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import setting, spreads

from configs.schema.federated import FederatedSettings
from configs.schema.tasks import TaskSpec
from federated.adapters.arrays import Arrays
from federated.adapters.warm_model import adaptation, put_on
from federated.aggregation.aggregation import RoundAggregation
from federated.silo.local_training import LocalSettings, PrivateUpdate, plain_update
from privacy.mechanism.streams import SEED_BYTES, Streams
from privacy.plan import PlanTerms, PrivacyPlan
from trainer.data.tokenizer import load_tokenizer
from trainer.models.adapters import adapted, adapter_weights
from trainer.models.load import load_model
from trainer.scoring.score import score
from trainer.tasks.task import Encoded, Task, kind_of

LIBRARIES = ("siloweave", "torch", "transformers", "peft", "opacus", "numpy")
DELTA = 1e-5
Silos = dict[str, tuple[list[Encoded], list[Encoded]]]


@dataclass(frozen=True)
class Setting:
    """One task's data and how it is trained.

    Attributes:
        rows: gives (silo, text, label) of a folder of data.
        context: in tokens.
        records: of a silo, at most; what the plan takes a silo to have.
        held_out: of a silo.
        sampling_rate: of a step.
        rounds: of the federation.
        steps: of a silo in a round.
        rate: of Adam without noise.
        private_rate: with it.
        norm: that gradients are clipped to.
    """

    rows: Callable[[Path], Iterator[tuple[str, str, str]]]
    context: int
    records: int
    held_out: int
    sampling_rate: float
    rounds: int
    steps: int
    rate: float
    private_rate: float
    norm: float = 1.0


def _snippets(folder: Path) -> Iterator[tuple[str, str, str]]:
    for row in _rows(folder / "vader_snippets" / "snippets.jsonl"):
        yield row["silo"], row["text"], row["label"]


def _intents(folder: Path) -> Iterator[tuple[str, str, str]]:
    for row in _rows(folder / "clinc150" / "train.jsonl"):
        yield f"silo-{hashlib.sha256(row['text'].encode()).digest()[1] % 5}", row["text"], row["label"]


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


SETTINGS = {
    "sentiment": Setting(_snippets, 48, 2500, 200, 0.1, 3, 8, 2e-3, 2e-3),
    "intent": Setting(_intents, 32, 2500, 200, 0.1, 6, 10, 5e-3, 5e-3),
}


@cache
def labels(data: Path, name: str) -> tuple[str, ...]:
    return tuple(sorted({label for _, _, label in SETTINGS[name].rows(data)}))


@cache
def task_of(model: Path, data: Path, name: str) -> Task:
    spec = TaskSpec(name="classification", labels=labels(data, name), pooling="mean")
    return kind_of(spec.name)(load_tokenizer(model), SETTINGS[name].context, spec)


@cache
def silos(model: Path, data: Path, name: str) -> Silos:
    """(training records, held-out records) of each silo; which is which goes by a hash of the text."""
    task, used, found = task_of(model, data, name), SETTINGS[name], defaultdict[str, Any](lambda: ([], []))
    known = labels(data, name)
    for silo, text, label in sorted(set(used.rows(data)), key=lambda row: hashlib.sha256(row[1].encode()).digest()):
        train, held_out = found[silo]
        place, most = (
            (held_out, used.held_out) if hashlib.sha256(text.encode()).digest()[2] < 40 else (train, used.records)
        )
        if len(place) < most:
            place += task.examples([{"text": text, "label": known.index(label)}])
    return dict(found)


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
        self.used, self.seed = SETTINGS[name], seed
        if arguments.rate:
            self.used = replace(self.used, rate=arguments.rate, private_rate=arguments.rate)
        where = (arguments.model, arguments.data, name)
        self.settings = FederatedSettings(
            task="classification",
            labels=labels(*where[1:]),
            pooling="mean",
            train=arguments.train,
            adapter_targets=("query", "value") if arguments.train == "lora" else "all-linear",
            lora_rank=arguments.rank,
            lora_alpha=2.0 * arguments.rank,
        )
        self.task, self.silos = task_of(*where), silos(*where)
        head = self.task.head
        self.model = adapted(load_model(arguments.model, head=head), adaptation(self.settings, head), 0)
        fresh = adapted(load_model(arguments.model, head=head), adaptation(self.settings, head), seed)
        self.start = {name: value.numpy() for name, value in adapter_weights(fresh).items()}
        self.travelled = 0

    def figures(self, adapter: Arrays, names: list[str] | None = None) -> dict[str, float]:
        put_on(self.model, adapter)
        found = [score(self.model.eval(), self.task, self.silos[name][1], 16) for name in names or self.silos]
        shown = sum(found[1:], found[0]).figures
        return {"accuracy": shown["accuracy"], "macro_f1": shown["macro_f1"]}

    def plain(self, adapter: Arrays, records: list[Encoded], steps: int, number: int, rate: float) -> Arrays:
        """Ordinary steps on Poisson batches of the size that the plan expects."""
        chance = np.random.default_rng((self.seed, number))
        expected = self.used.sampling_rate * self.used.records
        batches = [
            [records[index] for index in np.flatnonzero(chance.random(len(records)) < expected / len(records))]
            for _ in range(steps)
        ]
        local = LocalSettings(rate, "adam", 16, "bookkeeping")
        return plain_update(batches, expected, self.model, self.task, adapter, local)

    def private(self, adapter: Arrays, records: list[Encoded], silo: str, number: int, epsilon: float) -> Arrays:
        local = LocalSettings(self.used.private_rate, "adam", 16, "bookkeeping")
        digest = hashlib.sha256(f"{self.seed}/{silo}/{number}".encode()).hexdigest()
        update = PrivateUpdate(plan(self.used, epsilon), self.model, self.task, adapter, local)
        return update.run(Streams(os.urandom(SEED_BYTES), digest), [(record,) for record in records])

    def federated(self, epsilon: float | None) -> dict[str, float]:
        adapter, state = self.start, dict[str, Any]()
        for number in range(self.used.rounds):
            aggregation = RoundAggregation(self.settings, adapter, state, len(self.silos))
            for place, (silo, (records, _)) in enumerate(self.silos.items()):
                sent = aggregation.sent(silo).adapter
                if epsilon is None:
                    update = self.plain(sent, records, self.used.steps, 100 * number + place, self.used.rate)
                else:
                    update = self.private(sent, records, silo, number, epsilon)
                self.travelled += sum(array.nbytes for arrays in (sent, update) for array in arrays.values())
                aggregation.add(silo, update)
            adapter, state = aggregation.result()
        return self.figures(adapter)

    def guess(self) -> dict[str, float]:
        """The label that is most frequent in training, for all."""
        counts = Counter(example.target for train, _ in self.silos.values() for example in train)
        ((most, _),) = counts.most_common(1)
        held_out = [example.target == most for _, held_out in self.silos.values() for example in held_out]
        return {"accuracy": float(np.mean(held_out))}

    def alone(self) -> dict[str, float]:
        """Each silo trains by itself, as many steps as in the federation, and is asked about all silos' records."""
        steps, found = self.used.rounds * self.used.steps, []
        for place, (records, _) in enumerate(self.silos.values()):
            update = self.plain(self.start, records, steps, 1000 + place, self.used.rate)
            found.append(self.figures({name: value + update[name] for name, value in self.start.items()}))
        return {name: float(np.mean([one[name] for one in found])) for name in found[0]}

    def centralised(self) -> dict[str, float]:
        records = [record for train, _ in self.silos.values() for record in train]
        update = self.plain(self.start, records, self.used.rounds * self.used.steps, 2000, self.used.rate)
        return self.figures({name: value + update[name] for name, value in self.start.items()})

    def all(self) -> dict[str, Callable[[], dict[str, float]]]:
        return {
            "most frequent label": self.guess,
            "each silo alone": self.alone,
            "centralised": self.centralised,
            "federated": lambda: self.federated(None),
            "federated, epsilon 8": lambda: self.federated(8.0),
            "federated, epsilon 3": lambda: self.federated(3.0),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="an encoder's or decoder's folder with its tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="folder of vader_snippets/ and clinc150/")
    parser.add_argument("--task", choices=SETTINGS, required=True)
    parser.add_argument("--only", nargs="+", help="of the runs, by name")
    parser.add_argument("--train", choices=("lora", "head", "bitfit"), default="lora")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--rate", type=float, help="of Adam, with noise and without")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs: dict[str, list[dict[str, float]]] = defaultdict(list)
    used = SETTINGS[arguments.task]
    document = {
        **setting(LIBRARIES),
        "task": arguments.task,
        "settings": {name: value for name, value in vars(used).items() if name != "rows"},
        "labels": len(labels(arguments.data, arguments.task)),
    }
    for seed in arguments.seeds:  # all runs of a seed before the next: a table of fewer seeds is whole, too
        done = Runs(arguments, arguments.task, seed)
        for name, run in done.all().items():
            if arguments.only and name not in arguments.only:
                continue
            began, done.travelled = time.perf_counter(), 0
            found = {**run(), "seconds": time.perf_counter() - began, "megabytes": done.travelled / 1e6}
            runs[name].append(found)
            print(f"seed {seed}, {name}: {found}", file=sys.stderr, flush=True)
        document["seeds"] = arguments.seeds[: arguments.seeds.index(seed) + 1]
        document["silos"] = {name: [len(part) for part in parts] for name, parts in done.silos.items()}
        document["runs"] = {name: spreads(found) for name, found in runs.items()}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    for name, figures in document["runs"].items():
        shown = figures["accuracy"]
        print(f"{name}: accuracy {shown['median']:.3f} ({shown['minimum']:.3f} to {shown['maximum']:.3f})")


if __name__ == "__main__":
    main()
