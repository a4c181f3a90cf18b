"""Held-out bits per character of every way to aggregate, on a skewed split: same model, rounds, steps and records.

The silos are the genres of the embedded plays; the model is the pretrained Llama of 260,000 parameters. The silos'
steps and the aggregation are the product's own, without what carries them.

python benchmarks/federated_methods.py --model FOLDER --seeds 0 1 2 --json federated_methods.json
"""

import hashlib
import os
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from configs.federated_settings import FederatedSettings
from federated.adapters import Arrays
from federated.aggregation import Aggregation
from federated.local_training import LocalSettings, private_update, public_update
from federated.silo import warm_model
from privacy.plan import PlanRequest, PrivacyPlan
from privacy.streams import SEED_BYTES, Streams
from trainer.data.embedded import plays
from trainer.data.tokenizer import load_tokenizer
from trainer.evaluation import Score, score
from trainer.models import adapter_weights, add_adapter, load_adapter_weights, load_model
from trainer.tasks import CausalTask, Encoded

LIBRARIES = ("siloweave", "torch", "peft", "opacus", "numpy")
CONTEXT, RANK, ALPHA = 64, 8, 16.0
ROUNDS, STEPS, SAMPLING_RATE, RECORDS, HELD_OUT = 6, 3, 0.02, 2000, 60
EPSILON, DELTA = 8.0, 1e-5
SGD = {"optimizer": "sgd"}
# What a method changes: federated settings, with its learning rates under DP; and the other ones that it takes without.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fedavg": ({"learning_rate": 0.01}, {}),
    "fedavg, sgd inside": ({**SGD, "learning_rate": 0.5}, {}),
    "fedprox, mu 0.1": ({"proximal_mu": 0.1, "learning_rate": 0.01}, {}),
    "fedavgm": ({"aggregation": "fedavgm", "server_momentum": 0.5, "learning_rate": 0.01}, {}),
    "fedadam": ({"aggregation": "fedadam", "server_learning_rate": 0.02, "learning_rate": 0.01}, {}),
    "fedyogi": ({"aggregation": "fedyogi", "server_learning_rate": 0.02, "learning_rate": 0.01}, {}),
    "fedadagrad": ({"aggregation": "fedadagrad", "server_learning_rate": 0.02, "learning_rate": 0.01}, {}),
    "scaffold": ({"aggregation": "scaffold", **SGD, "learning_rate": 0.5}, {}),
    "median": ({"aggregation": "median", "learning_rate": 0.01}, {}),
    "trimmed mean, 1 of 6": (
        {"aggregation": "trimmed_mean", "byzantine_silos": 1, "min_silos": 3, "learning_rate": 0.01},
        {},
    ),
    "krum, 1 of 6": ({"aggregation": "krum", "byzantine_silos": 1, "min_silos": 5, "learning_rate": 0.01}, {}),
    "ffa-lora": ({"adapters": "ffa", "learning_rate": 0.01}, {}),
    "exact product": ({"adapters": "product", "learning_rate": 0.01}, {}),
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
    request = PlanRequest(
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
    peft, task = warm_model(model, RANK, ALPHA), task_of(model)
    load_adapter_weights(peft, {name: torch.from_numpy(array) for name, array in adapter.items()})
    scores = {name: score(peft.eval(), task, held_out, 16) for name, (_, held_out) in silos(model).items()}
    overall = sum(scores.values(), Score(0.0, 0, 0))
    return {"overall": overall.bits_per_char, "worst_silo": max(one.bits_per_char for one in scores.values())}


def fresh_adapter(model: Path, seed: int) -> Arrays:
    """A at random from the seed, B zero."""
    return {
        name: array.numpy()
        for name, array in adapter_weights(add_adapter(load_model(model), RANK, ALPHA, seed)).items()
    }


def federate(model: Path, settings: FederatedSettings, seed: int, *, with_dp: bool) -> dict[str, Any]:
    """One federation from a fresh adapter, to its final figures."""
    began = time.perf_counter()
    train = private_update if with_dp else public_update
    adapter, state = fresh_adapter(model, seed), dict[str, Any]()
    travelled = 0
    for number in range(1, ROUNDS + 1):
        aggregation = Aggregation(settings, adapter, state, len(silos(model)))
        for name, (records, _) in silos(model).items():
            sent = aggregation.sent(name)
            peft = warm_model(model, sent.rank, sent.alpha, "", seed if settings.adapters == "ffa" else None)
            local = LocalSettings(
                settings.learning_rate, settings.optimizer, 16, "bookkeeping", settings.proximal_mu, sent.correction
            )
            digest = hashlib.sha256(f"{seed}/{name}/{number}".encode()).hexdigest()
            streams = Streams(os.urandom(SEED_BYTES) if with_dp else bytes(SEED_BYTES), digest)
            update = train(plan(), streams, peft, task_of(model), sent.adapter, records, local)
            travelled += sum(array.nbytes for array in (*sent.adapter.values(), *update.values()))
            aggregation.add(name, update)
        adapter, state = aggregation.result()
    return {**bits(model, adapter), "megabytes": travelled / 1e6, "seconds": time.perf_counter() - began}
