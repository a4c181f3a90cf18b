"""What a federation learns of a task, with DP and without: beside a guess, each silo alone, and all data in one place.

Base models and data lie where you say. The silos' steps and the aggregation are the product's own, without what carries
them. Which model a task is measured with is your choice; docs/tasks.md has ours.

python benchmarks/tasks.py --model MINILM --data FOLDER --task sentiment --seeds 0 1 2 --json tasks.json
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from figures import setting
from task_data import SETTINGS, Setting, Unit, silos, task_of
from transformers.modeling_outputs import BaseModelOutput

from configs.schema.federated import FederatedSettings
from configs.schema.tasks import AugmentationSettings
from federated.adapters.arrays import Arrays
from federated.adapters.warm_model import adaptation, hold_back, put_on
from federated.aggregation.aggregation import RoundAggregation
from federated.silo.local_training import LocalSettings, PrivateUpdate, plain_update
from privacy.mechanism.streams import SEED_BYTES, Streams
from privacy.plan import PlanTerms, PrivacyPlan
from trainer.augmentation import augmentation
from trainer.metrics.question_answering import token_f1
from trainer.models.adapters import adapted, adapter_weights, trainable
from trainer.models.load import load_model
from trainer.scoring.score import score
from trainer.tasks.task import IGNORED

LIBRARIES = ("siloweave", "torch", "transformers", "peft", "opacus", "numpy")
DELTA, MICRO_BATCH = 1e-5, 32
AT_START = 30  # records of a silo whose gradients are looked at


class Above(torch.nn.Module):
    """Stands where a layer was, or the embeddings, whose outcome is there already."""

    def forward(self, hidden: torch.Tensor | None = None, *_: Any, **named: Any) -> torch.Tensor:
        """What lies below, as it came."""
        return named["inputs_embeds"] if hidden is None else hidden


class LowerOnce:
    """The frozen layers of a body, which read a text once, whoever asks again: no seconds of it are worth telling.

    Takes the place of the body's ``forward``, so that all that trains keeps its name.
    """

    read: ClassVar[dict[tuple[int, ...], torch.Tensor]] = {}  # of the one model of a process, whatever the seed

    def __init__(self, body: Any, whole: Any, frozen: int) -> None:
        self.upper = body.forward
        self.lower = whole
        upper, lower = layers_of(body), layers_of(whole)
        for place in range(frozen):
            upper[place] = Above()
        del lower[frozen:]
        if hasattr(body, "embeddings"):  # BERT adds positions there; a Llama is given what it would look up
            body.embeddings = Above()
        else:
            whole.norm = torch.nn.Identity()
        body.forward = self

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: Any = None, token_type_ids: Any = None, **_: Any
    ) -> BaseModelOutput:
        """What the body gives of texts (B, T)."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        lengths = mask.sum(dim=1).tolist()
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        rows = [
            self.hidden((*ids[:length].tolist(), *kinds[:length].tolist()))
            for ids, kinds, length in zip(input_ids, types, lengths, strict=True)
        ]
        hidden = torch.zeros(*input_ids.shape, rows[0].shape[-1])
        for place, row in enumerate(rows):
            hidden[place, : len(row)] = row
        found: BaseModelOutput = self.upper(inputs_embeds=hidden, attention_mask=attention_mask)
        return found

    def hidden(self, text: tuple[int, ...]) -> torch.Tensor:
        """(T, D) of a text alone, which is its tokens and then their types."""
        if text not in self.read:
            ids, kinds = torch.tensor(text).view(2, 1, -1)
            named = {"token_type_ids": kinds} if hasattr(self.lower, "embeddings") else {}
            with torch.no_grad():
                self.read[text] = self.lower(input_ids=ids, **named).last_hidden_state[0]
        return self.read[text]


def layers_of(body: Any) -> torch.nn.ModuleList:
    return next(part for part in body.modules() if isinstance(part, torch.nn.ModuleList))


def plan(used: Setting, epsilon: float) -> PrivacyPlan:
    terms = PlanTerms(
        sampling_rate=used.sampling_rate,
        max_grad_norm=used.norm,
        clipping_function=used.clipping,
        noise_multiplier=1.0,
        rounds=used.rounds,
        steps_per_round=used.steps,
        delta=DELTA,
    )
    return terms.calibrated(epsilon).bind(used.records)


class Runs:
    """All runs of one task and seed."""

    def __init__(self, arguments: argparse.Namespace, used: Setting, seed: int) -> None:
        self.used, self.seed = used, seed
        where = (arguments.model, arguments.data, used)
        self.task, self.silos, spec = task_of(*where), silos(*where), used.spec(arguments.data)
        self.settings = FederatedSettings(
            task=spec.name,
            labels=spec.labels,
            pooling=spec.pooling,
            template=spec.template,
            train=used.train,
            adapter_targets=used.targets or "all-linear",
            lora_rank=used.rank,
            lora_alpha=2.0 * used.rank,
        )
        self.augment = augmentation(self.task, AugmentationSettings(**used.augmentation))
        self.folder, self.travelled = arguments.model, 0
        self.model, fresh = self.fresh(0), self.fresh(seed)
        self.start = {name: value.numpy() for name, value in adapter_weights(fresh).items()}
        if arguments.lower_once:
            self.read_lower_layers_once()

    def fresh(self, seed: int) -> Any:
        """The model as a federation starts with it; what is frozen doesn't travel."""
        head = self.task.head
        model = adapted(load_model(self.folder, head=head), adaptation(self.settings, head), seed)
        hold_back(model, self.used.frozen and self.used.frozen + 1)
        return model

    def read_lower_layers_once(self) -> None:
        bodies = [_body(model) for model in (self.model, load_model(self.folder, head=self.task.head))]
        everything = len(layers_of(bodies[0]))
        LowerOnce(*bodies, everything if self.used.train == "head" else self.used.frozen)

    def figures(self, adapter: Arrays) -> dict[str, float]:
        """The task's figures over all silos' held-out records."""
        put_on(self.model, adapter)
        found = [score(self.model.eval(), self.task, held_out, MICRO_BATCH) for _, held_out in self.silos.values()]
        return {name: value for name, value in sum(found[1:], found[0]).figures.items() if isinstance(value, float)}

    def local(self) -> LocalSettings:
        return LocalSettings(self.used.rate, "adam", MICRO_BATCH, "bookkeeping", augment=self.augment)

    def plain(self, adapter: Arrays, units: list[Unit], steps: int, number: int) -> Arrays:
        """Ordinary steps on Poisson batches of the size that the plan expects, of one example of each unit."""
        chance = np.random.default_rng((self.seed, number))
        expected = self.used.sampling_rate * self.used.records
        change = self.augment or (lambda example, _: example)
        batches = [
            [
                change(units[index][chance.integers(len(units[index]))], chance)
                for index in np.flatnonzero(chance.random(len(units)) < expected / len(units))
            ]
            for _ in range(steps)
        ]
        return plain_update(batches, expected, self.model, self.task, adapter, self.local())

    def private(self, adapter: Arrays, units: list[Unit], silo: str, number: int, epsilon: float) -> Arrays:
        digest = hashlib.sha256(f"{self.seed}/{silo}/{number}".encode()).hexdigest()
        update = PrivateUpdate(plan(self.used, epsilon), self.model, self.task, adapter, self.local())
        return update.run(Streams(os.urandom(SEED_BYTES), digest), units)

    def federated(self, epsilon: float | None) -> dict[str, float]:
        adapter, state = self.start, dict[str, Any]()
        for number in range(self.used.rounds):
            aggregation = RoundAggregation(self.settings, adapter, state, len(self.silos))
            for place, (silo, (units, _)) in enumerate(self.silos.items()):
                sent = aggregation.sent(silo).adapter
                if epsilon is None:
                    update = self.plain(sent, units, self.used.steps, 100 * number + place)
                else:
                    update = self.private(sent, units, silo, number, epsilon)
                self.travelled += sum(array.nbytes for arrays in (sent, update) for array in arrays.values())
                aggregation.add(silo, update)
            adapter, state = aggregation.result()
        return self.figures(adapter)

    def guess(self) -> dict[str, float]:
        """What needs no model: the label or tag that is most frequent in training; the whole context as its answer."""
        if self.used.task == "qa":
            asked: list[Any] = [question for _, held_out in self.silos.values() for question in held_out]
            return {"answer_f1": float(np.mean([token_f1(one.context, one.answers, "en") for one in asked]))}
        if self.task.head is None:
            return self.figures(self.start)
        targets = (np.ravel(unit[0].target) for units, _ in self.silos.values() for unit in units)
        ((most, _),) = Counter(one for target in targets for one in target if one != IGNORED).most_common(1)
        head = {name: np.zeros_like(value) for name, value in self.start.items() if "classifier" in name}
        (bias,) = (name for name in head if name.endswith("bias"))
        head[bias][most] = 1
        return self.figures(self.start | head)

    def alone(self) -> dict[str, float]:
        """Each silo trains by itself, as many steps as in the federation, and is asked about all silos' records."""
        found = [self.trained_on(units, 1000 + place) for place, (units, _) in enumerate(self.silos.values())]
        return {name: float(np.mean([one[name] for one in found])) for name in found[0]}

    def centralised(self) -> dict[str, float]:
        return self.trained_on([unit for units, _ in self.silos.values() for unit in units], 2000)

    def trained_on(self, units: list[Unit], number: int) -> dict[str, float]:
        """Figures after as many ordinary steps on these units as all rounds have together."""
        update = self.plain(self.start, units, self.used.rounds * self.used.steps, number)
        return self.figures({name: value + update[name] for name, value in self.start.items()})

    def first_step(self) -> dict[str, float]:
        """What a silo's first step carries at epsilon 8, and the noise on it, as lengths over all that trains.

        The first is that of the mean clipped gradient of the silos' records, an estimate without their own scatter.
        """
        bound, parameters = plan(self.used, 8.0), list(trainable(self.model).values())
        put_on(self.model.eval(), self.start)
        norms, total, squares = list[float](), torch.zeros(sum(one.numel() for one in parameters)), 0.0
        for unit in (unit for units, _ in self.silos.values() for unit in units[:AT_START]):
            loss = self.task.record_losses(self.model, self.task.collate([unit[0]])).sum()
            gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])
            norms.append(float(gradient.norm()))
            clipped = gradient * min(1.0, self.used.norm / norms[-1])
            total, squares = total + clipped, squares + float(clipped.square().sum())
        many = len(norms)
        carried = math.sqrt(max(0.0, float(total.square().sum()) - squares) / (many * (many - 1)))
        noise = bound.noise_std / bound.expected_batch_size * math.sqrt(len(total))
        of_records = {"gradient_norm": float(np.median(norms)), "numbers": len(total)}
        return {"carried_to_noise": carried / noise, "carried": carried, "noise": noise, **of_records}

    def measured(self, name: str, *, seconds: bool) -> dict[str, float]:
        began, self.travelled = time.perf_counter(), 0
        found = {**RUNS[name](self), "megabytes": self.travelled / 1e6}
        return {**found, "seconds": time.perf_counter() - began} if seconds else found


RUNS: dict[str, Callable[[Runs], dict[str, float]]] = {
    "first step": Runs.first_step,
    "a guess": Runs.guess,
    "federated": lambda runs: runs.federated(None),
    "federated, epsilon 8": lambda runs: runs.federated(8.0),
    "federated, epsilon 3": lambda runs: runs.federated(3.0),
    "centralised": Runs.centralised,
    "each silo alone": Runs.alone,
}


def _body(model: Any) -> Any:
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(bare, bare.base_model_prefix)


def chosen(name: str, changes: list[str]) -> Setting:
    """A task's setting with what is to be otherwise: NAME=VALUE, a value as in JSON, or a word."""
    pairs = [change.split("=", 1) for change in changes]
    return replace(SETTINGS[name], **{key: _value(value) for key, value in pairs})


def _value(written: str) -> Any:
    try:
        found = json.loads(written)
    except json.JSONDecodeError:
        return written
    return tuple(found) if isinstance(found, list) else found


def measured(arguments: argparse.Namespace, used: Setting) -> dict[str, Any]:
    """All runs, those of an earlier call included, which are kept in the file one by one."""
    settings = {name: value for name, value in vars(used).items() if not callable(value)} | {
        "model": str(arguments.model)
    }
    document = {**setting(LIBRARIES), "task": arguments.task, "settings": settings, "runs": {}}
    if arguments.json.exists():
        earlier = json.loads(arguments.json.read_text())
        if earlier["settings"] != json.loads(json.dumps(settings)):
            raise SystemExit(f"{arguments.json} has runs of other settings; give another file")
        document["runs"] = earlier["runs"]
    for seed in arguments.seeds:  # all runs of a seed before the next: a table of fewer seeds is whole, too
        names = [name for name in arguments.only or RUNS if str(seed) not in document["runs"].get(name, {})]
        done = Runs(arguments, used, seed) if names else None
        for name in names:
            found = done.measured(name, seconds=not arguments.lower_once)
            document["silos"] = {silo: [len(part) for part in parts] for silo, parts in done.silos.items()}
            document["runs"].setdefault(name, {})[str(seed)] = found
            print(f"seed {seed}, {name}: {found}", file=sys.stderr, flush=True)
            arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the folder of a model with its tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="folder of the datasets")
    parser.add_argument("--task", choices=SETTINGS, required=True)
    parser.add_argument("--only", nargs="+", choices=RUNS, metavar="RUN", help="of the runs, by name")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="of the task's setting (task_data.py)"
    )
    parser.add_argument("--lower-once", action="store_true", help="frozen layers read a text once; leaves seconds out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, required=True, help="runs that are there already are not repeated")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name, seeds in measured(arguments, chosen(arguments.task, arguments.set))["runs"].items():
        figure = next(iter(next(iter(seeds.values()))))  # a task's main one comes first
        values = [found[figure] for found in seeds.values()]
        shown = f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
        print(f"{name}: {figure} {shown}, {len(values)} seeds")


if __name__ == "__main__":
    main()
