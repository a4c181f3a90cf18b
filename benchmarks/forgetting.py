"""How much of an earlier task a federation forgets while it learns another one, and what drawing it back saves.

Sequential tasks without replay: a head on a frozen encoder learns 20 intents of short questions, then 20 others, of the
same 40 labels. The second federation starts from what the first has made, once for each strength of the anchor. Steps
and aggregation are the product's own, on one silo for each task and without noise: what is measured is forgetting. At
most two minutes on one idle thread.

python benchmarks/forgetting.py --model MINILM --data FOLDER --json forgetting.json
"""

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import setting

from configs.schema.federated import FederatedSettings
from federated.adapters.arrays import Arrays
from federated.adapters.warm_model import adaptation, put_on
from federated.aggregation.aggregation import RoundAggregation
from federated.silo.local_training import LocalSettings, plain_update
from trainer.data.tokenizer import load_tokenizer
from trainer.models.adapters import adapted, adapter_weights
from trainer.models.load import load_model
from trainer.scoring.score import score
from trainer.tasks.task import Encoded, kind_of

LIBRARIES = ("siloweave", "torch", "transformers", "numpy")
INTENTS, CONTEXT, HELD_OUT = 20, 32, 300
ROUNDS, STEPS, BATCH, RATE = 3, 8, 64, 0.03


class Tasks:
    """Two sets of labels, one after the other, and the model that learns them."""

    def __init__(self, model: Path, data: Path) -> None:
        with (data / "clinc150" / "train.jsonl").open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        self.labels = tuple(sorted({row["label"] for row in rows})[: 2 * INTENTS])
        spec = self._settings(0.0).task_spec
        self.task = kind_of(spec.name)(load_tokenizer(model), CONTEXT, spec)
        self.train, self.held_out = ([list[Encoded](), list[Encoded]()] for _ in range(2))
        for row in sorted(rows, key=lambda row: hashlib.sha256(row["text"].encode()).digest()):
            if row["label"] in self.labels:
                label = self.labels.index(row["label"])
                held_out = self.held_out[label // INTENTS]
                place = held_out if len(held_out) < HELD_OUT else self.train[label // INTENTS]
                place += self.task.examples([{"text": row["text"], "label": label}])
        head = self.task.head
        self.model = adapted(load_model(model, head=head), adaptation(self._settings(0.0), head), 0)
        self.start = {name: value.numpy().copy() for name, value in adapter_weights(self.model).items()}

    def _settings(self, anchor: float) -> FederatedSettings:
        return FederatedSettings(
            task="classification", labels=self.labels, pooling="mean", train="head", learning_rate=RATE, anchor=anchor
        )

    def learnt(self, start: Arrays, which: int, anchor: float, seed: int) -> Arrays:
        """The head after a federation on one set of labels."""
        settings, chance, adapter, state = self._settings(anchor), np.random.default_rng(seed), start, dict[str, Any]()
        for _ in range(ROUNDS):
            aggregation = RoundAggregation(settings, adapter, state, 1)
            sent = aggregation.sent("silo")
            local = LocalSettings(RATE, "adam", 16, "bookkeeping", settings.pull, sent.correction)
            batches = [self._batch(self.train[which], chance) for _ in range(STEPS)]
            aggregation.add("silo", plain_update(batches, BATCH, self.model, self.task, sent.adapter, local))
            adapter, state = aggregation.result()
        return adapter

    def _batch(self, records: list[Encoded], chance: np.random.Generator) -> list[Encoded]:
        return [records[place] for place in np.flatnonzero(chance.random(len(records)) < BATCH / len(records))]

    def accuracy(self, adapter: Arrays) -> dict[str, float]:
        """On held-out records of both sets."""
        put_on(self.model, adapter)
        found = [score(self.model.eval(), self.task, records, 16).figures["accuracy"] for records in self.held_out]
        return dict(zip(("first", "second"), found, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="an encoder's folder with its tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="folder of clinc150/")
    parser.add_argument("--anchors", type=float, nargs="+", default=[0.0, 0.01])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began, tasks = time.perf_counter(), Tasks(arguments.model, arguments.data)
    before = tasks.learnt(tasks.start, 0, 0.0, arguments.seed)
    runs = {"before": tasks.accuracy(before)}
    for anchor in arguments.anchors:
        runs[f"anchor {anchor:g}"] = tasks.accuracy(tasks.learnt(before, 1, anchor, arguments.seed + 1))
    for name, figures in runs.items():
        print(f"{name}: first task {figures['first']:.3f}, second task {figures['second']:.3f}")
    document = {
        **setting(LIBRARIES),
        "settings": {"rounds": ROUNDS, "steps": STEPS, "batch": BATCH, "rate": RATE, "seed": arguments.seed},
        "records": {"train": list(map(len, tasks.train)), "held_out": list(map(len, tasks.held_out))},
        "accuracy": runs,
        "seconds": time.perf_counter() - began,
    }
    arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
