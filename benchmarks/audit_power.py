"""How often an audit passes a sound engine, and how often it catches a broken one. No peer: they ship no such audit.

The engine is broken from outside, by patching: the product has no switch for it.

Two settings: gradient canaries alone, and all ways of looking at a small model with gradient and example canaries.

python benchmarks/audit_power.py --runs 100 --model-runs 10 --json audit_power.json
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from figures import setting, spreads

from configs.schema.data import SourceSettings
from configs.schema.pretrain import ModelSettings
from federated.audit.canary_training import AuditSettings, AuditTraining
from privacy.audit.bound import (
    FAIL_CONFIDENCE,
    REFERENCE_PLAN,
    WARN_CONFIDENCE,
    Finding,
    fair_coins,
    judge,
    num_guesses,
)
from privacy.audit.canaries import probe_alone
from privacy.clipping.clipping import clipping
from privacy.mechanism.streams import SEED_BYTES, Streams
from privacy.plan import PrivacyPlan
from trainer.data.sources import ReadCounts, read_rows
from trainer.data.tokenizer import train_tokenizer
from trainer.models.adapters import add_adapter
from trainer.models.families import new_model
from trainer.tasks.text import CausalTask

LIBRARIES = ("siloweave", "torch", "opacus", "dp-accounting", "numpy", "scipy")


@contextmanager
def noise_divided_by(factor: float) -> Iterator[None]:
    honest = PrivacyPlan.noise_std.fget
    with mock.patch.object(PrivacyPlan, "noise_std", property(lambda plan: honest(plan) / factor)):
        yield


@contextmanager
def clipping_off() -> Iterator[None]:
    with mock.patch(
        "privacy.mechanism.dp_sgd.clipping",
        lambda model, norm, *rest, **more: clipping(model, 1e3 * norm, *rest, **more),
    ):
        yield


ENGINES = {
    "correct": lambda: noise_divided_by(1),
    "noise_divided_by_2": lambda: noise_divided_by(2),
    "noise_divided_by_4": lambda: noise_divided_by(4),
    "clipping_off": clipping_off,
}


def one_audit(canaries: int) -> dict[str, Any]:
    began = time.perf_counter()
    coins = fair_coins(canaries)
    scores = probe_alone(REFERENCE_PLAN.bind(canaries), Streams(os.urandom(SEED_BYTES), "00" * 32), coins)
    guesses = num_guesses(REFERENCE_PLAN, canaries)
    claim = {"epsilon": REFERENCE_PLAN.epsilon, "delta": REFERENCE_PLAN.delta}
    finding = judge("gradient_white_box", scores, coins, guesses, **claim)
    return {**shown(finding), "seconds": time.perf_counter() - began}


def shown(finding: Finding) -> dict[str, Any]:
    return {
        "verdict": finding.verdict,
        "correct_guesses": finding.correct,
        "bound_95": finding.bound(WARN_CONFIDENCE),
        "bound_99_9": finding.bound(FAIL_CONFIDENCE),
    }


@cache
def public_text() -> tuple[Any, tuple[str, ...]]:
    source = SourceSettings(source="embedded:python-docs")
    texts = tuple(row["text"] for row in read_rows(source, [], ReadCounts()))[:500]
    with tempfile.TemporaryDirectory() as folder:
        return train_tokenizer(texts, 512, Path(folder)), texts


def one_model_audit(canaries: int) -> dict[str, dict[str, Any]]:
    """All ways of looking, in one run on an untrained Llama of 2 blocks, width 32, with LoRA of rank 4."""
    began = time.perf_counter()
    tokenizer, texts = public_text()
    settings = ModelSettings(hidden_size=32, layers=2, heads=2, intermediate_size=64, context_length=64)
    model, task = add_adapter(new_model(settings, 512, seed=0), 4, 8.0, seed=0), CausalTask(tokenizer, 64)
    canary_settings = AuditSettings(
        gradient_canaries=canaries,
        example_canaries=512,
        example_tokens=16,
        record_count=canaries,
        learning_rate=2e-2,
        micro_batch_size=16,
    )
    background = [task.encode(text) for text in texts[:200]]
    training = AuditTraining(REFERENCE_PLAN, canary_settings, model, task, background, "00" * 32)
    training.train(lambda: None, lambda _: os.urandom(SEED_BYTES))
    findings = training.findings()
    seconds = time.perf_counter() - began
    return {finding.mode: {**shown(finding), "seconds": seconds} for finding in findings}


def summary(audits: list[dict[str, Any]]) -> dict[str, Any]:
    figures = spreads([{name: value for name, value in audit.items() if name != "verdict"} for audit in audits])
    counts = {verdict: sum(audit["verdict"] == verdict for audit in audits) for verdict in ("pass", "warn", "fail")}
    return {"runs": len(audits), "verdicts": counts, "figures": figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--model-runs", type=int, default=10)
    parser.add_argument("--canaries", type=int, default=2000)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    one_audit(arguments.canaries)  # the first one also loads libraries
    audits: dict[str, list[dict[str, Any]]] = {name: [] for name in ENGINES}
    for number in range(arguments.runs):
        for name, broken in ENGINES.items():  # interleaved: the machine's other load falls on all of them
            with broken():
                audits[name].append(one_audit(arguments.canaries))
        if (number + 1) % 10 == 0:
            print(f"{number + 1}/{arguments.runs}", file=sys.stderr)
    models: dict[str, list[dict[str, Any]]] = {}
    for number in range(arguments.model_runs):
        for name, broken in ENGINES.items():
            with broken():
                for mode, found in one_model_audit(arguments.canaries).items():
                    models.setdefault(f"{name}, {mode}", []).append(found)
        print(f"model {number + 1}/{arguments.model_runs}", file=sys.stderr)
    quarter = REFERENCE_PLAN.model_copy(update={"noise_multiplier": REFERENCE_PLAN.noise_multiplier / 4})
    document = {
        **setting(LIBRARIES),
        "plan": REFERENCE_PLAN.model_dump(),
        "canaries": arguments.canaries,
        "guesses": num_guesses(REFERENCE_PLAN, arguments.canaries),
        "epsilon_claimed": REFERENCE_PLAN.epsilon,
        "epsilon_with_a_quarter_of_the_noise": quarter.epsilon,
        "gradient_canaries_alone": {name: summary(found) for name, found in audits.items()},
        "with_a_model": {name: summary(found) for name, found in models.items()},
    }
    arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    for name, found in {**document["gradient_canaries_alone"], **document["with_a_model"]}.items():
        bound = found["figures"]["bound_99_9"]
        print(
            f"{name}: {found['verdicts']} of {found['runs']}; "
            f"{found['figures']['correct_guesses']['median']:g} right; bound at 99.9%: {bound['median']:.3f} "
            f"({bound['minimum']:.3f} to {bound['maximum']:.3f})"
        )


if __name__ == "__main__":
    main()
