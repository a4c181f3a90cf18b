"""Held-out bits per character of every way to aggregate, on a skewed split: same model, rounds, steps and records.

The silos are the genres of the embedded plays; the model is the pretrained Llama of 260,000 parameters. The silos'
steps and the aggregation are the product's own, without what carries them; all of it under record-level DP.

python benchmarks/federated_methods.py --model FOLDER --seeds 0 1 2 --json federated_methods.json
"""

import argparse
import hashlib
import json
import os
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from figures import setting, spreads

from configs.schema.federated import FederatedSettings
from federated.adapters.arrays import Arrays
from federated.adapters.warm_model import warm_model
from federated.aggregation.aggregation import RoundAggregation
from federated.silo.local_training import LocalSettings, PrivateUpdate
from privacy.mechanism.streams import SEED_BYTES, Streams
from privacy.plan import PlanTerms, PrivacyPlan
from trainer.data.embedded import plays
from trainer.data.tokenizer import load_tokenizer
from trainer.models.adapters import Adaptation, adapter_weights, add_adapter, load_adapter_weights
from trainer.models.load import load_model
from trainer.scoring.score import score
from trainer.tasks.task import Encoded
from trainer.tasks.text import CausalTask

LIBRARIES = ("siloweave", "torch", "peft", "opacus", "numpy")
CONTEXT, RANK, ALPHA = 64, 8, 16.0
ROUNDS, STEPS, SAMPLING_RATE, RECORDS, HELD_OUT = 6, 2, 0.02, 2000, 40
EPSILON, DELTA = 8.0, 1e-5
ADAM, SGD = {"learning_rate": 0.02}, {"optimizer": "sgd", "learning_rate": 1.0}
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": ADAM,
    "fedavg, sgd inside": SGD,
    "fedprox, mu 0.1": {**ADAM, "proximal_mu": 0.1},
    "fedavgm, momentum 0.5": {**ADAM, "aggregation": "fedavgm", "server_momentum": 0.5},
    "fedadam": {**ADAM, "aggregation": "fedadam"},
    "fedyogi": {**ADAM, "aggregation": "fedyogi"},
    "fedadagrad": {**ADAM, "aggregation": "fedadagrad"},
    "scaffold, sgd inside": {**SGD, "aggregation": "scaffold"},
    "median": {**ADAM, "aggregation": "median"},
    "trimmed mean, 1 may lie": {**ADAM, "aggregation": "trimmed_mean", "byzantine_silos": 1, "min_silos": 3},
    "krum, 1 may lie": {**ADAM, "aggregation": "krum", "byzantine_silos": 1, "min_silos": 5},
    "ffa-lora": {**ADAM, "adapters": "ffa"},
    "exact product": {**ADAM, "adapters": "product"},
    "exact product, ranks 2 to 8": {
        **ADAM,
        "adapters": "product",
        "lora_ranks": {"comedies": 2, "histories": 2, "problems": 4, "roman": 4},
    },
}


@cache
def silos(model: Path) -> dict[str, tuple[list[Encoded], list[Encoded]]]:
    """(training records, held-out records) of each genre; which is which goes by a hash of the text."""
    task, found = task_of(model), dict[str, tuple[list[Encoded], list[Encoded]]]()
    for row in plays():
        train, held_out = found.setdefault(row["silo"], ([], []))
        if hashlib.sha256(row["text"].encode()).digest()[0] < 26:
            if len(held_out) < HELD_OUT:
                held_out.append(task.encode(row["text"]))
        elif len(train) < RECORDS:
            train.append(task.encode(row["text"]))
    return found


@cache
def task_of(model: Path) -> CausalTask:
    return CausalTask(load_tokenizer(model), CONTEXT)


@cache
def plan() -> PrivacyPlan:
    """The same for all silos: each has RECORDS records."""
    request = PlanTerms(
        sampling_rate=SAMPLING_RATE,
        max_grad_norm=1.0,
        noise_multiplier=1.0,
        rounds=ROUNDS,
        steps_per_round=STEPS,
        delta=DELTA,
    )
    return request.calibrated(EPSILON).bind(RECORDS)


def bits(model: Path, adapter: Arrays) -> dict[str, float]:
    """Bits per character of the held-out records: of all, and of the silo that is served worst."""
    peft, task = warm_model(model, Adaptation(RANK, ALPHA)), task_of(model)
    load_adapter_weights(peft, {name: torch.from_numpy(array) for name, array in adapter.items()})
    scores = {name: score(peft.eval(), task, held_out, 16) for name, (_, held_out) in silos(model).items()}
    first, *others = scores.values()
    return {"overall": sum(others, first).main, "worst_silo": max(one.main for one in scores.values())}


def fresh_adapter(model: Path, seed: int) -> Arrays:
    """A at random from the seed, B zero."""
    return {
        name: array.numpy()
        for name, array in adapter_weights(add_adapter(load_model(model), RANK, ALPHA, seed)).items()
    }


def federate(model: Path, method: str, seed: int) -> dict[str, float]:
    """One federation from a fresh adapter to its final figures."""
    began, travelled = time.perf_counter(), 0
    settings = FederatedSettings(rounds=ROUNDS, local_steps=STEPS, lora_rank=RANK, lora_alpha=ALPHA, **METHODS[method])
    adapter, state = fresh_adapter(model, seed), dict[str, Any]()
    for number in range(1, ROUNDS + 1):
        aggregation = RoundAggregation(settings, adapter, state, len(silos(model)))
        for name, (records, _) in silos(model).items():
            sent = aggregation.sent(name)
            peft = warm_model(
                model, Adaptation(sent.rank, sent.alpha), "", seed if settings.adapters == "ffa" else None
            )
            local = LocalSettings(
                settings.learning_rate, settings.optimizer, 16, "bookkeeping", settings.proximal_mu, sent.correction
            )
            digest = hashlib.sha256(f"{seed}/{name}/{number}".encode()).hexdigest()
            streams = Streams(os.urandom(SEED_BYTES), digest)
            update = PrivateUpdate(plan(), peft, task_of(model), sent.adapter, local).run(
                streams, [(record,) for record in records]
            )
            sizes = (array.nbytes for arrays in (sent.adapter, sent.correction, update) for array in arrays.values())
            travelled += sum(sizes)
            aggregation.add(name, update)
        adapter, state = aggregation.result()
    return {**bits(model, adapter), "megabytes": travelled / 1e6, "seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a model's folder with its tokenizer")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    document = {
        **setting(LIBRARIES),
        "plan": plan().terms.model_dump(),
        "records_per_silo": RECORDS,
        "methods": METHODS,
        "base": bits(arguments.model, fresh_adapter(arguments.model, 0)),
    }
    for seed in arguments.seeds:  # all methods of a seed before the next: a table of fewer seeds is whole, too
        for method in METHODS:
            found = federate(arguments.model, method, seed)
            runs[method].append(found)
            print(f"seed {seed}, {method}: {found}", file=sys.stderr, flush=True)
        table = {name: spreads(done) for name, done in runs.items()}
        document["seeds"], document["bits_per_char"] = len(runs["fedavg"]), table
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    for name, figures in document["bits_per_char"].items():
        overall, worst = figures["overall"], figures["worst_silo"]
        print(
            f"{name}: {overall['median']:.3f} ({overall['minimum']:.3f} to {overall['maximum']:.3f}), "
            f"worst silo {worst['median']:.3f}, {figures['megabytes']['median']:.1f} MB"
        )


if __name__ == "__main__":
    main()
