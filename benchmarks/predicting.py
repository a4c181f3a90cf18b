"""Seconds of a chunk's predictions with texts of like length together, beside the file's own order and one at a time.

python benchmarks/predicting.py --json predicting.json

A BERT of random weights labels 256 texts, which is what `siloweave predict` asks together; lengths are drawn evenly
from 4 to the context. All three give the same labels, which is checked, and take turns in an order that is drawn anew
each time.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from figures import setting, spreads

from trainer.tasks.task import Encoded, by_length

TEXTS, BATCH = 256, 16


class Labels:
    """A classifier, and texts of many lengths."""

    def __init__(self, context: int, width: int, layers: int) -> None:
        from transformers import BertConfig, BertForSequenceClassification

        torch.manual_seed(0)
        draw = random.Random(0)
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        config = BertConfig(
            vocab_size=1000, max_position_embeddings=context, num_attention_heads=4, num_labels=3, **sizes
        )
        self._model = BertForSequenceClassification(config).eval()
        lengths = [draw.randint(4, context) for _ in range(TEXTS)]
        rows = [tuple(draw.randrange(5, 1000) for _ in range(length)) for length in lengths]
        self.texts = [Encoded(ids, 0, truncated=False) for ids in rows]

    def probabilities(self, batches: Sequence[Sequence[Encoded]]) -> dict[int, torch.Tensor]:
        """By text."""
        found = {}
        for batch in batches:
            longest = -(-max(len(one.ids) for one in batch) // 8) * 8
            ids = torch.tensor([[*one.ids, *[0] * (longest - len(one.ids))] for one in batch])
            mask = torch.tensor([[1] * len(one.ids) + [0] * (longest - len(one.ids)) for one in batch])
            with torch.no_grad():
                said_BL = self._model(input_ids=ids, attention_mask=mask).logits.softmax(dim=1)
            found |= {id(one): said_L for one, said_L in zip(batch, said_BL, strict=True)}
        return found


def ways(texts: Sequence[Encoded]) -> dict[str, Callable[[], list[Any]]]:
    """How batches are made."""
    return {
        "of like length": lambda: list(by_length(texts, BATCH)),
        "in the file's order": lambda: [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)],
        "one at a time": lambda: [[one] for one in texts],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    labels = Labels(given.context, given.width, given.layers)
    made, draw = ways(labels.texts), random.Random(0)
    runs: list[dict[str, float]] = []
    largest = 0.0
    for _ in range(given.repetitions):
        seconds, answers = {}, {}
        for name in draw.sample(list(made), len(made)):
            began = time.perf_counter()
            answers[name] = labels.probabilities(made[name]())
            seconds[name] = time.perf_counter() - began
        runs.append({name: seconds[name] for name in made})
        alone = answers["one at a time"]
        for found in answers.values():
            largest = max(largest, *(float((found[key] - alone[key]).abs().max()) for key in alone))
            if any(int(found[key].argmax()) != int(alone[key].argmax()) for key in alone):
                raise SystemExit("a text has another label in another batch")
    document = {
        **setting(["torch", "transformers"]),
        "settings": {"texts": TEXTS, "batch": BATCH, **{k: v for k, v in vars(given).items() if k != "json"}},
        "seconds": spreads(runs),
        "times_as_long": spreads([{name: run[name] / run["of like length"] for name in made} for run in runs]),
        "largest_difference_of_a_probability": largest,
    }
    print(json.dumps(document, indent=2))
    if given.json:
        given.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
