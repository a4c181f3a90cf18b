"""How much of an earlier task a federation forgets while it learns another one, and what drawing it back saves.

Sequential tasks without replay: a head on a frozen encoder learns the sentiment of one domain of snippets, then that of
another, whose words and shares of labels are others. The second federation starts from what the first has made, once
for each strength of the anchor. Steps and aggregation are the product's own, without noise: what is measured is
forgetting. At most two minutes on one thread.

python benchmarks/forgetting.py --model MINILM --data FOLDER --json forgetting.json
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import setting
from tasks import labels, silos, task_of

from configs.schema.federated import FederatedSettings
from federated.adapters.arrays import Arrays
from federated.adapters.warm_model import adaptation, put_on
from federated.aggregation.aggregation import RoundAggregation
from federated.silo.local_training import LocalSettings, plain_update
from trainer.models.adapters import adapted, adapter_weights
from trainer.models.load import load_model
from trainer.scoring.score import score
from trainer.tasks.task import Encoded

LIBRARIES = ("siloweave", "torch", "transformers", "numpy")
TASK = "sentiment"
ROUNDS, STEPS, BATCH, RATE = 4, 5, 64, 0.03


class Sequence:
    """One silo's data after another's, for one model."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        where = (arguments.model, arguments.data, TASK)
        self.task, self.silos, self.labels = task_of(*where), silos(*where), labels(*where[1:])
        head = self.task.head
        self.model = adapted(load_model(arguments.model, head=head), adaptation(self._settings(0.0), head), 0)
        self.start = {name: value.numpy() for name, value in adapter_weights(self.model).items()}

    def _settings(self, anchor: float) -> FederatedSettings:
        return FederatedSettings(
            task="classification", labels=self.labels, pooling="mean", train="head", learning_rate=RATE, anchor=anchor
        )

    def learnt(self, start: Arrays, domain: str, anchor: float, seed: int) -> Arrays:
        """The head after a federation on a domain."""
        settings, chance, adapter, state = self._settings(anchor), np.random.default_rng(seed), start, dict[str, Any]()
        for _ in range(ROUNDS):
            aggregation = RoundAggregation(settings, adapter, state, 1)
            sent, records = aggregation.sent(domain), self.silos[domain][0]
            local = LocalSettings(RATE, "adam", 16, "bookkeeping", settings.pull, sent.correction)
            batches = [self._batch(records, chance) for _ in range(STEPS)]
            aggregation.add(domain, plain_update(batches, BATCH, self.model, self.task, sent.adapter, local))
            adapter, state = aggregation.result()
        return adapter

    def _batch(self, records: list[Encoded], chance: np.random.Generator) -> list[Encoded]:
        return [records[place] for place in np.flatnonzero(chance.random(len(records)) < BATCH / len(records))]

    def accuracy(self, adapter: Arrays, domain: str) -> float:
        put_on(self.model, adapter)
        return float(score(self.model.eval(), self.task, self.silos[domain][1], 16).figures["accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="an encoder's folder with its tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="folder of vader_snippets/")
    parser.add_argument("--domains", nargs=2, default=["tweets", "nytEditorialSnippets"], help="the first one first")
    parser.add_argument("--anchors", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began, found = time.perf_counter(), Sequence(arguments)
    first, second = arguments.domains
    before = found.learnt(found.start, first, 0.0, arguments.seed)
    runs = {"before": {domain: found.accuracy(before, domain) for domain in (first, second)}}
    for anchor in arguments.anchors:
        after = found.learnt(before, second, anchor, arguments.seed + 1)
        runs[f"anchor {anchor:g}"] = {domain: found.accuracy(after, domain) for domain in (first, second)}
    for name, figures in runs.items():
        print(name, *(f"{domain} {accuracy:.3f}" for domain, accuracy in figures.items()), sep=", ")
    document = {
        **setting(LIBRARIES),
        "settings": {"rounds": ROUNDS, "steps": STEPS, "batch": BATCH, "rate": RATE, "seed": arguments.seed},
        "held_out": {domain: len(found.silos[domain][1]) for domain in (first, second)},
        "accuracy": runs,
        "seconds": time.perf_counter() - began,
    }
    arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
