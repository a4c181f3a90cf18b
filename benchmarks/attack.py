"""What a silo's rounds and its model give away, without noise and at epsilon 8: membership, canaries, extraction.

python benchmarks/attack.py --json attack.json

Small silos of made-up texts that have nothing in common but their letters, half of them held out, through the silo's
own code: requests, ledger, training, and then what `siloweave silo attack` does. One silo is the whole federation: the
model after its last round is the one that would be served, and how far its updates lowered a loss is the loss against
the base model's. Each run has texts, split, batches and noise of its own. Without noise means a run with clients as
units, whose updates leave as they are.

Canaries are lines "the key of NAME is SECRET"; exposure (Carlini et al. 2019) ranks each secret's loss among 1,023
random ones in the same line. A secret is extracted where greedy decoding goes on with it after "the key of NAME is ".
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from figures import setting, spread

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
EPSILON, DELTA = 8.0, 1e-5
OVERFIT = (2, 40, 0.5, 0.01)
# Rounds, steps of each, sampling rate and learning rate: about as the presets train; and so long on few records that
# all of them are learnt.
SCHEDULES = {
    "dp_tiny": (2, 2, 0.01, 0.02),
    "dp_demo": (5, 4, 0.02, 0.02),
    "dp_overfit": OVERFIT,
    "no_dp_overfit": OVERFIT,
}
LINE, LETTERS, SECRET, CANDIDATES = "the key of {} is {}", "abcdefgh", 6, 1023


def plan(kind: str, steps: int | None = None) -> Any:
    """Of a run under DP at epsilon 8, or of one whose updates leave as they are."""
    from client_plans import client_plan

    from privacy.plan import PlanTerms

    rounds, own_steps, rate, _ = SCHEDULES[kind]
    if kind == "no_dp_overfit":
        return client_plan(max_grad_norm=1e3, noise_multiplier=1.0, rounds=rounds, num_clients=5)
    schedule = {"rounds": rounds, "steps_per_round": steps or own_steps, "sampling_rate": rate}
    return PlanTerms(max_grad_norm=1.0, noise_multiplier=1.0, delta=DELTA, **schedule).calibrated(EPSILON)


def trained(folder: Path, base: Path, texts: list[str], kind: str, steps: int | None = None) -> tuple[Any, Any, Any]:
    """A finished run. Returns the silo's settings, its ledger's entries and the last adapter."""
    from attacked_silos import silo_config, train
    from silo_requests import TRUSTED

    from federated.silo.silo import Silo

    (folder / "state").mkdir(parents=True)  # without a key of its split: the silo draws one
    silo = Silo(silo_config(folder, base, texts), TRUSTED)
    _, own_steps, _, learning_rate = SCHEDULES[kind]
    adapter = train(silo, plan(kind, steps), learning_rate=learning_rate, local_steps=steps or own_steps)
    bodies = silo.ledger.journal.bodies()
    silo.close()
    return silo.config, bodies, adapter


def membership(folder: Path, base: Path, seed: int, kind: str) -> dict[str, Any]:
    """AUCs of one run, and how long its attack took."""
    from attacked_silos import notes

    from federated.audit.own_attack import attack
    from federated.audit.own_records import Wanted

    config, bodies, _ = trained(folder, base, notes(200, seed), kind)
    began = time.monotonic()
    found = attack(config, bodies, Wanted())
    attacks = {"model_loss": found["rounds"][-1]["loss"], **found["attacks"]}
    figures = {name: {"auc": one["auc"], "interval": one["auc_interval"]} for name, one in attacks.items()}
    return {"seconds": time.monotonic() - began, "records": found["members"] + found["held_out"], "attacks": figures}


def summed(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """AUC by attack, and in how many runs its interval holds 0.5."""
    shown: dict[str, Any] = {"runs": len(runs), "seconds": spread([run["seconds"] for run in runs])}
    for name in runs[0]["attacks"]:
        found = [run["attacks"][name] for run in runs]
        holds = sum(one["interval"][0] <= 0.5 <= one["interval"][1] for one in found)
        shown[name] = {"auc": spread([one["auc"] for one in found]), "intervals_with_one_half": holds}
    return shown


def canaries(folder: Path, base: Path, kind: str, steps: int) -> dict[str, Any]:
    """Exposure and extraction of secrets, of those that were trained on and of those that were held out."""
    import numpy as np
    from attacked_silos import ALPHA, RANK, notes

    from federated.adapters.warm_model import put_on
    from federated.silo.units import units_of
    from privacy.audit.attacks import exposure
    from trainer.data.tokenizer import load_tokenizer
    from trainer.inference.decoding import Decoding
    from trainer.inference.generation import write
    from trainer.models.adapters import Adaptation, adapted
    from trainer.models.load import load_model
    from trainer.scoring.record_losses import record_losses
    from trainer.tasks.task import task_of

    draw = random.Random(0)

    def secret() -> str:
        return "".join(draw.choices(LETTERS, k=SECRET))

    planted = {LINE.format(f"ward {number}", secret()): number for number in range(40)}
    config, _, adapter = trained(folder, base, [*planted, *notes(40)], kind, steps)
    task, tokenizer = task_of(config.task_spec, base), load_tokenizer(base)
    model = adapted(load_model(base), Adaptation(RANK, ALPHA), 0).eval()
    put_on(model, adapter)
    units, figures = units_of(config), {}
    for name, side in (("trained_on", units.train), ("held_out", units.held_out)):
        lines = [unit[0]["text"] for unit in side if unit[0]["text"] in planted]
        bits, extracted = [], 0
        for line in lines:
            others = [LINE.format(f"ward {planted[line]}", secret()) for _ in range(CANDIDATES)]
            losses = record_losses(model, task, [task.encode(text) for text in (line, *others)], 128)
            bits.append(float(exposure(losses[:1], losses[1:])[0]))
            start = line[:-SECRET]
            said = write(model, tokenizer, task.opening(start), task.context_length, Decoding(max_new_tokens=SECRET))
            extracted += said.startswith(line[-SECRET:])
        figures[name] = {"canaries": len(lines), "exposure_bits": float(np.mean(bits)), "extracted": extracted}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="at epsilon 8, as each of the presets trains")
    parser.add_argument("--overfit-runs", type=int, default=5, help="each, at epsilon 8 and without noise")
    parser.add_argument("--canary-steps", type=int, default=100, help="of each round")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    import torch
    from attacked_silos import public_base

    torch.set_num_threads(1)
    began = time.monotonic()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="attack-") as name:
        base = public_base(Path(name) / "model")
        for kind, schedule in SCHEDULES.items():
            count = options.overfit_runs if schedule == OVERFIT else options.runs
            figures[kind] = summed(
                [membership(Path(name) / f"{kind}-{seed}", base, seed, kind) for seed in range(count)]
            )
            if schedule == OVERFIT:
                found = canaries(Path(name) / f"{kind}-canaries", base, kind, options.canary_steps)
                figures[kind]["canaries"] = found
            print(json.dumps({kind: figures[kind]}))
    document = {
        **setting(("siloweave", "torch", "transformers", "opacus", "dp-accounting", "scipy")),
        "epsilon": EPSILON,
        "delta": DELTA,
        "noise_multipliers": {kind: plan(kind).noise_multiplier for kind in SCHEDULES if kind != "no_dp_overfit"},
        "seconds": time.monotonic() - began,
        "figures": figures,
    }
    if options.json:
        options.json.write_text(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
