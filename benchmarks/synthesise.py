"""A classifier that learns from a federation's synthetic text, beside one that is trained under DP directly.

python benchmarks/synthesise.py --generator SMOLLM2 --encoder MINILM --data FOLDER --work FOLDER --json synthesise.json

Four silos of short public texts, positive or negative. A decoder learns under DP to write a text after its label, and
``trainer/synthesis`` draws records from it. The classifier is a head on an encoder: once it learns by DP rounds over
the silos, once from the drawn records without noise, and once from records of the decoder as it came. All are asked
about the same held-out texts.

Each silo holds canaries too, "the key of ward N is SECRET". Exposure (Carlini et al. 2019) ranks a secret's loss under
the decoder among random ones in the same line: whoever has the drawn text alone knows less. What is done lies in
``--work``, silo by silo and batch by batch: the command goes on where it was ended.
"""

import argparse
import hashlib
import json
import os
import random
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import setting
from task_data import SETTINGS, Setting
from tasks import Runs, plan

from configs.schema.data import RecordSettings
from configs.schema.federated import FederatedSettings
from federated.adapters.arrays import Arrays, from_bytes, to_bytes
from federated.adapters.warm_model import adaptation, put_on
from federated.aggregation.aggregation import RoundAggregation
from federated.silo.local_training import LocalSettings, PrivateUpdate
from privacy.audit.attacks import exposure
from privacy.mechanism.streams import SEED_BYTES, Streams
from trainer.data.tokenizer import load_tokenizer
from trainer.inference.decoding import Decoding
from trainer.models.adapters import adapted, adapter_weights
from trainer.models.load import load_model
from trainer.scoring.record_losses import record_losses
from trainer.synthesis.conditions import Form
from trainer.synthesis.drawing import Drawing, synthesise
from trainer.tasks.task import kind_of

LIBRARIES = ("siloweave", "torch", "transformers", "peft", "opacus", "numpy")
EPSILON = 8.0
SENTIMENT = replace(SETTINGS["sentiment"], records=400, held_out=100)
WRITING = Setting("chat", SENTIMENT.rows, template="A {label} review: {text}", records=400)
LINE, LETTERS, LENGTH, CANARIES, OTHERS = "the key of ward {} is {}", "abcdefgh", 6, 5, 255


class Generator:
    """A decoder that learns to write the silos' texts.

    Args:
        folder: of the model.
        data: folder of the datasets.
        work: where what is done lies.
        used: how it is trained.
    """

    def __init__(self, folder: Path, data: Path, work: Path, used: Setting) -> None:
        self.work, self.used, self.spec = work, used, used.spec(data)
        self.tokenizer = load_tokenizer(folder)
        self.task = kind_of(self.spec.name)(self.tokenizer, self.used.context, self.spec)
        settings = FederatedSettings(
            task=self.spec.name,
            template=self.spec.template,
            adapter_targets=self.used.targets or "all-linear",
            lora_rank=self.used.rank,
            lora_alpha=2.0 * self.used.rank,
        )
        self.settings, self.model = settings, adapted(load_model(folder), adaptation(settings, None), 0)
        self.start = {name: value.detach().numpy().copy() for name, value in adapter_weights(self.model).items()}
        self.silos, self.planted = self._silos(data)

    def _silos(self, data: Path) -> tuple[dict[str, list[Any]], list[str]]:
        """The rows that the classifier trains on, by the same hash, and canaries."""
        draw, planted = random.Random(0), []
        found: dict[str, list[Any]] = {}
        rows = {
            hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest(): (silo, row)
            for silo, row in self.used.rows(data)
        }
        for digest, (silo, row) in sorted(rows.items()):
            units = found.setdefault(silo, [])
            if digest[2] >= 40 and len(units) < self.used.records - CANARIES and (unit := self.task.examples([row])):
                units.append(unit)
        for units in found.values():
            for _ in range(CANARIES):
                planted.append(LINE.format(len(planted), "".join(draw.choices(LETTERS, k=LENGTH))))
                units.append(self.task.examples([{"label": "positive", "text": planted[-1]}]))
        return found, planted

    def trained(self) -> Arrays:
        """The adapter after the last round."""
        adapter, state = self.start, dict[str, Any]()
        terms = plan(self.used, EPSILON)
        local = LocalSettings(self.used.rate, "adam", 8, "bookkeeping")
        for number in range(self.used.rounds):
            aggregation = RoundAggregation(self.settings, adapter, state, len(self.silos))
            for silo, units in self.silos.items():
                sent, kept = aggregation.sent(silo).adapter, self.work / f"round-{number}-{silo}.safetensors"
                if not kept.exists():
                    began = time.perf_counter()
                    streams = Streams(os.urandom(SEED_BYTES), hashlib.sha256(f"{silo}/{number}".encode()).hexdigest())
                    update = PrivateUpdate(terms, self.model, self.task, sent, local).run(streams, units)
                    kept.with_suffix(".part").write_bytes(to_bytes(update))
                    kept.with_suffix(".part").rename(kept)
                    print(f"{kept.stem}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
                aggregation.add(silo, from_bytes(kept.read_bytes()))
            adapter, state = aggregation.result()
        return adapter

    def records(self, name: str, number: int) -> Any:
        """Records that the model writes as it is now, as many of each label."""
        form = Form(self.task, self.spec, RecordSettings(source="x"))
        conditions = form.conditions(["label=negative", "label=positive"])
        decoding = Decoding(self.used.context, temperature=1.0, top_p=0.95)
        drawing = Drawing(self.model.eval(), self.tokenizer, self.used.context, form, conditions, decoding, number)
        return synthesise(
            drawing,
            self.work / f"drawn-{name}",
            {"model": name},
            lambda done, of: print(f"{name}: {done}/{of}", file=sys.stderr, flush=True),
        )

    def exposures(self) -> list[float]:
        """Bits of each canary under the model as it is now."""
        draw, bits = random.Random(1), []
        for line in self.planted:
            start = line[:-LENGTH]
            others = [f"{start}{''.join(draw.choices(LETTERS, k=LENGTH))}" for _ in range(OTHERS)]
            rows = [{"label": "positive", "text": text} for text in (line, *others)]
            losses = record_losses(self.model.eval(), self.task, [self.task.examples([row])[0] for row in rows], 32)
            bits.append(float(exposure(losses[:1], losses[1:])[0]))
        return bits


def accuracy(runs: Runs, data: Path, records: Iterable[Any]) -> float:
    """Of the classifier that learns from these records, by as many steps as all rounds together."""
    labels = runs.used.spec(data).labels
    units = [
        runs.task.examples([{"text": record["text"], "label": labels.index(record["label"])}]) for record in records
    ]
    return runs.trained_on(units, 3000)[runs.task.measures.main]


def trained_by(arguments: Namespace) -> Setting:
    """How the decoder is trained."""
    names = ("rank", "context", "sampling_rate", "rounds", "steps", "rate")
    chosen = {name: getattr(arguments, name) for name in names}
    return replace(WRITING, targets=tuple(arguments.targets), **chosen)


def measured(arguments: Namespace) -> Iterator[dict[str, Any]]:
    """Part after part of the figures, the dearest last."""
    used = {"text": trained_by(arguments), "head": SENTIMENT}
    generator = Generator(arguments.generator, arguments.data, arguments.work, used["text"])
    adapter = generator.trained()
    put_on(generator.model, adapter)
    drawn = generator.records("trained", arguments.records)
    text = "\n".join(record["text"] for record in drawn.records)
    yield {
        "noise_multiplier": {name: plan(one, EPSILON).terms.noise_multiplier for name, one in used.items()},
        "drawn": {"records": len(drawn.records), "texts": drawn.drawn, "dropped": dict(drawn.dropped)},
        "examples": [dict(record) for record in drawn.records[:6]],
        "secrets_in_text": sum(line[-LENGTH:] in text for line in generator.planted),
    }
    runs = Runs(Namespace(model=arguments.encoder, data=arguments.data, lower_once=True), SENTIMENT, 0)
    yield {"accuracy_guess": runs.guess()[runs.task.measures.main]}
    yield {"accuracy_synthetic": accuracy(runs, arguments.data, drawn.records)}
    yield {"accuracy_direct": runs.federated(EPSILON)[runs.task.measures.main]}
    bits = generator.exposures()
    yield {"canaries": len(bits), "others": OTHERS, "exposure_bits": float(np.mean(bits)), "largest_bits": max(bits)}
    put_on(generator.model, generator.start)
    untrained = generator.records("untrained", arguments.records)
    yield {"accuracy_untrained": accuracy(runs, arguments.data, untrained.records)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", type=Path, required=True, help="the folder of a decoder with its tokenizer")
    parser.add_argument("--encoder", type=Path, required=True, help="the folder of an encoder with its tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="folder of the datasets")
    parser.add_argument("--work", type=Path, required=True, help="what is done is kept there")
    parser.add_argument("--records", type=int, default=400, help="to draw")
    parser.add_argument("--targets", nargs="*", default=[], help="of LoRA; none: all linear layers")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--sampling-rate", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    told = {name: value for name, value in vars(trained_by(arguments)).items() if not callable(value)}
    document = {**setting(LIBRARIES), "epsilon": EPSILON, "settings": told}
    for part in measured(arguments):
        document |= part
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
        print(json.dumps(part), flush=True)


if __name__ == "__main__":
    main()
