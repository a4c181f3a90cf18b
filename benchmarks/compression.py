"""Bytes of a round and held-out bits per character of each way that updates may travel, under record-level DP.

Silos, records, model and plan are those of federated_methods.py: six genres, the pretrained Llama of 260,000
parameters, the same rounds and steps. Beside the ways to pack a LoRA adapter's updates stands the whole model in
float32, which is what the bytes are compared with. Bytes are those of both directions, as they are sent.

python benchmarks/compression.py --model FOLDER --seeds 0 1 2 --json compression.json
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout's own packages, as the tests take them

import torch
from federated_methods import ROUNDS, STEPS, plan, silos, task_of
from figures import setting, spreads

from configs.schema.federated import FederatedSettings
from federated.adapters.arrays import Arrays, to_bytes
from federated.adapters.packed_updates import read_update
from federated.adapters.update_codec import encoded
from federated.adapters.warm_model import adaptation, warm_model
from federated.aggregation.aggregation import RoundAggregation
from federated.silo.local_training import LocalSettings, PrivateUpdate
from federated.silo.remainders.remainders import with_feedback
from privacy.compression import Compression
from privacy.mechanism.streams import Streams
from trainer.models.adapters import adapted, adapter_weights, load_adapter_weights
from trainer.models.load import load_model
from trainer.scoring.score import score

LIBRARIES = ("siloweave", "torch", "peft", "numpy")
RATE = {"learning_rate": 0.02}
LARGE = {**RATE, "lora_rank": 8, "lora_alpha": 16.0}  # on all linear layers
SMALL = {**RATE, "lora_rank": 2, "lora_alpha": 4.0, "adapter_targets": ("q_proj", "v_proj")}
INT8, INT4 = ({"update_dtype": dtype, "update_block": 64} for dtype in ("int8", "int4"))
WAYS: dict[str, dict[str, Any]] = {
    "whole model, float32": {"train": "full", "learning_rate": 0.002},
    "r=8, float32": LARGE,
    "r=8, bfloat16": {**LARGE, "update_dtype": "bfloat16"},
    "r=8, int8, a scale for each array": {**LARGE, "update_dtype": "int8"},
    "r=8, int8 in blocks of 64": {**LARGE, **INT8},
    "r=8, int4 in blocks of 64": {**LARGE, **INT4},
    "r=8, int4, 25% of the values": {**LARGE, **INT4, "update_share": 0.25},
    "r=8, int4, 10% of the values": {**LARGE, **INT4, "update_share": 0.1},
    "r=8, int4, 1% of the values": {**LARGE, **INT4, "update_share": 0.01},
    "r=2 on q and v, float32": SMALL,
    "r=2 on q and v, int4 in blocks of 64": {**SMALL, **INT4},
    "r=2 on q and v, int4, 25% of the values": {**SMALL, **INT4, "update_share": 0.25},
}


def settings_of(way: str) -> FederatedSettings:
    return FederatedSettings(rounds=ROUNDS, local_steps=STEPS, **WAYS[way])


def start(model: Path, settings: FederatedSettings, seed: int) -> Arrays:
    """What travels before the first round."""
    found = adapter_weights(adapted(load_model(model), adaptation(settings), seed))
    return {name: value.numpy() for name, value in found.items()}


def bits(model: Path, settings: FederatedSettings, weights: Arrays) -> dict[str, float]:
    """Bits per character of the held-out records: of all, and of the silo that is served worst."""
    warm, task = warm_model(model, adaptation(settings)), task_of(model)
    load_adapter_weights(warm, {name: torch.from_numpy(array) for name, array in weights.items()})
    scores = [score(warm.eval(), task, held_out, 16) for _, held_out in silos(model).values()]
    return {"overall": sum(scores[1:], scores[0]).main, "worst_silo": max(one.main for one in scores)}


def travelled(update: Arrays, settings: FederatedSettings, left: Arrays) -> tuple[int, Arrays, Arrays]:
    """Bytes of an update, what its receiver reads, and what it has left out for the next one."""
    how, still_left = Compression.of(settings) or settings.update_dtype, Arrays()
    if isinstance(how, Compression):
        content, still_left = with_feedback(update, how, left if how.leaves_out else {})
    else:
        content = encoded(update, how)
    return len(content), read_update(content, how, update, 2**40), still_left


def federate(model: Path, way: str, seed: int) -> dict[str, float]:
    """One federation to its final figures; the noise is the same in all ways that train the same weights."""
    began, settings = time.perf_counter(), settings_of(way)
    weights, state, left = start(model, settings, seed), dict[str, Any](), dict[str, Arrays]()
    asked = replied = 0
    for number in range(1, ROUNDS + 1):
        aggregation = RoundAggregation(settings, weights, state, len(silos(model)))
        for name, (records, _) in silos(model).items():
            sent, warm = aggregation.sent(name), warm_model(model, adaptation(settings))
            local = LocalSettings(settings.learning_rate, settings.optimizer, 16, "bookkeeping")
            digest = hashlib.sha256(f"{seed}/{name}/{number}".encode()).hexdigest()
            private = PrivateUpdate(plan(), warm, task_of(model), sent.adapter, local)
            update = private.run(Streams(bytes(32), digest), [(record,) for record in records])
            size, read, left[name] = travelled(update, settings, left.get(name, {}))
            asked, replied = asked + len(to_bytes(sent.adapter)), replied + size
            aggregation.add(name, read)
        weights, state = aggregation.result()
    each = ROUNDS * len(silos(model))
    moved = {"request_bytes": asked / each, "reply_bytes": replied / each, "round_bytes": (asked + replied) / each}
    return {**bits(model, settings, weights), **moved, "seconds": time.perf_counter() - began}


def table(runs: dict[str, list[dict[str, float]]], base: float) -> dict[str, Any]:
    """Of each way: its figures, how many times fewer bytes than the whole model, and what it loses in quality.

    The loss is of bits per character, seed by seed: to the same adapter in float32, in % of that one's own; and of
    what the best LoRA gains over the base model, in %.
    """
    found = {}
    for way, done in runs.items():
        reference = runs["r=2 on q and v, float32" if way.startswith("r=2") else "r=8, float32"]
        pairs = list(zip(done, reference, strict=True))
        figures = [
            {
                **one,
                "lost_percent": 100 * (one["overall"] / other["overall"] - 1),
                "gained_percent": 100 * (base - one["overall"]) / (base - best["overall"]),
                "fewer_bytes_a_round": whole["round_bytes"] / one["round_bytes"],
                "fewer_bytes_a_reply": whole["reply_bytes"] / one["reply_bytes"],
            }
            for (one, other), best, whole in zip(pairs, runs["r=8, float32"], runs["whole model, float32"], strict=True)
        ]
        found[way] = spreads(figures)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a model's folder with its tokenizer")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model: Path = arguments.model
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    first = settings_of("r=8, float32")
    base = bits(model, first, start(model, first, 0))
    document = {**setting(LIBRARIES), "plan": plan().terms.model_dump(), "ways": WAYS, "base": base}
    for seed in arguments.seeds:  # all ways of a seed before the next: a table of fewer seeds is whole, too
        for way in WAYS:
            runs[way].append(federate(model, way, seed))
            print(f"seed {seed}, {way}: {runs[way][-1]}", file=sys.stderr, flush=True)
        document["seeds"], document["figures"] = len(runs["r=8, float32"]), table(runs, base["overall"])
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    for way, figures in document["figures"].items():
        overall = figures["overall"]
        print(
            f"{way}: {overall['median']:.3f} ({overall['minimum']:.3f} to {overall['maximum']:.3f}), "
            f"{figures['request_bytes']['median']:,.0f} + {figures['reply_bytes']['median']:,.0f} bytes, "
            f"{figures['fewer_bytes_a_round']['median']:.1f} times fewer, lost {figures['lost_percent']['median']:.2f}%"
        )


if __name__ == "__main__":
    main()
