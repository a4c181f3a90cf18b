"""What utility.py measures: each study's records, its settings, and a frozen body that reads a text once."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from task_data import numbered
from tasks import LowerOnce, layers_of

from configs.load import load
from configs.schema.schema import RunConfig
from federated.adapters import warm_model as warm
from federated.adapters.arrays import Arrays
from trainer.data.embedded import plays
from trainer.models.load import load_model
from trainer.scoring.score import score
from trainer.tasks.task import Encoded, Row, task_of

DELTA, MICRO_BATCH = 1e-5, 32


def _snippets(folder: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Four domains, which are the silos."""
    if folder is None:
        raise SystemExit("--data: give the folder of the datasets")
    with (folder / "vader_snippets" / "snippets.jsonl").open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            yield row["silo"], {"text": row["text"], "label": row["label"]}


def _plays(_: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The demo's silos."""
    for row in plays():
        yield row["silo"], {"text": row["text"]}


@dataclass(frozen=True)
class Study:
    """One dataset and how it is trained on.

    Attributes:
        title: of its panel.
        rows: gives (silo, fields) of a record.
        main: the figure that ways are compared by.
        label: what it is called beside its axis.
        min_honest: of the secure sums; one silo more colludes.
        overrides: settings of the task and of what trains.
        records: of a silo.
        held_out: of a silo.
        sampling_rate: of a step.
        steps: of the whole run; a round of a federation is one.
        rate: of plain steps on clipped gradients: one that is good for data in one place.
        rate_without: of steps without DP, whose gradients are longer, since nothing clips them.
        norm: that gradients are clipped to.
    """

    title: str
    rows: Callable[[Path | None], Iterator[tuple[str, dict[str, Any]]]]
    main: str
    label: str
    min_honest: int
    overrides: tuple[str, ...]
    records: int
    held_out: int
    sampling_rate: float
    steps: int
    rate: float
    rate_without: float
    norm: float = 1.0

    @property
    def reads_once(self) -> bool:
        """Whether nothing of the body trains."""
        return "federated.train=head" in self.overrides

    def said(self) -> dict[str, Any]:
        """Its numbers, for the file of figures."""
        return {name: value for name, value in vars(self).items() if name not in ("rows", "title", "label")}


STUDIES = {
    "sentiment": Study(
        "Sentiment, 4 domains (MiniLM, head)",
        _snippets,
        "accuracy",
        "accuracy",
        min_honest=3,
        overrides=(
            "federated.task=classification",
            'federated.labels=["negative","positive"]',
            "federated.pooling=mean",
            "federated.train=head",
        ),
        records=1000,
        held_out=400,
        sampling_rate=0.1,
        steps=20,
        rate=1.0,
        rate_without=1.0,
    ),
    "plays": Study(
        "Plays, 6 genres (Llama, LoRA)",
        _plays,
        "bits_per_char",
        "bits per character",
        min_honest=5,
        overrides=('federated.adapter_targets=["v_proj"]', "federated.lora_rank=4", "federated.lora_alpha=8"),
        records=1000,
        held_out=60,
        sampling_rate=0.02,
        steps=20,
        rate=0.5,
        rate_without=0.1,
    ),
}


def settings_of(study: Study, records: "Records", epsilon: float, seed: int, *, together: bool) -> RunConfig:
    """A run's settings: all of it the same but who makes the noise."""
    given = [
        f'model.source="{records.model}"',
        f'data.private.source="{records.source}"',
        "data.private.public_record_counts={}",
        f"data.private.public_record_count={study.records}",
        "data.private.held_out_fraction=1e-12",  # the benchmark itself holds records out
        f"federated.rounds={study.steps}",
        "federated.local_steps=1",
        "federated.optimizer=sgd",
        f"federated.learning_rate={study.rate}",
        f"privacy.sampling_rate={study.sampling_rate}",
        f"privacy.max_grad_norm={study.norm}",
        f"privacy.epsilon={epsilon}",
        f"privacy.delta={DELTA}",
        "privacy.budget_epsilon=100",
        f"run.seed={seed}",
    ]
    shared = [
        "federated.secure_aggregation=true",
        "federated.colluders=1",
        "privacy.mode=distributed",
        f"privacy.min_honest={study.min_honest}",
    ]
    return load("tiny", [*given, *study.overrides, *(shared if together else [])])


class Records:
    """What trains and what is held out at each silo, by a hash of the record, and the model that is asked.

    Args:
        study: whose they are.
        model: the base model's folder.
        data: folder of the datasets.
        work: receives the silos' records as a file, and what a frozen body has read.
    """

    def __init__(self, study: Study, model: Path, data: Path | None, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.model, self.source = model.absolute(), (work / f"utility-{study.main}.jsonl").absolute()
        rows = self._dealt(study, data)
        lines = [json.dumps({**row, "silo": silo}) for silo, (train, _) in rows.items() for row in train]
        self.source.write_text("\n".join(lines) + "\n")
        config = settings_of(study, self, 1.0, 0, together=False)
        spec = config.federated.task_spec
        self.task = task_of(spec, self.model)
        self.how = warm.adaptation(config.federated, self.task.head)
        self.silos: dict[str, list[tuple[Encoded, ...]]] = {}
        self.held_out: dict[str, list[Encoded]] = {}
        for silo, (train, held_out) in rows.items():
            self.silos[silo] = [self.task.examples([numbered(row, spec.labels)]) for row in train]
            self.held_out[silo] = self._scored([numbered(row, spec.labels) for row in held_out])
        self.read = (work / f"utility-{study.main}.read").absolute() if study.reads_once else None
        if self.read:
            self._read_all(self.read)

    def _dealt(self, study: Study, data: Path | None) -> dict[str, tuple[list[Any], list[Any]]]:
        found = defaultdict[str, tuple[list[Any], list[Any]]](lambda: ([], []))
        hashed = {
            hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest(): (s, row) for s, row in study.rows(data)
        }
        for digest, (silo, row) in sorted(hashed.items()):
            train, held_out = found[silo]
            if digest[2] < 40 and len(held_out) < study.held_out:
                held_out.append(row)
            elif digest[2] >= 40 and len(train) < study.records:
                train.append(row)
        return dict(sorted(found.items()))

    def _scored(self, rows: list[Row]) -> list[Encoded]:
        return [example for row in rows for example in self.task.scored([row])]

    def _read_all(self, place: Path) -> None:
        """Has the frozen body read all texts, once for this folder."""
        if not place.exists():
            read_once(place)
            model = self.warm().eval()
            score(model, self.task, [unit[0] for units in self.silos.values() for unit in units], MICRO_BATCH)
            score(model, self.task, [one for held_out in self.held_out.values() for one in held_out], MICRO_BATCH)
            torch.save(LowerOnce.read, place)
        read_once(place)

    def warm(self) -> Any:
        """The one model of this process, by layers that Opacus knows."""
        return warm.warm_model(self.model, self.how, onednn=False)

    def figures(self, adapter: Arrays) -> dict[str, float]:
        """Of all silos' held-out records."""
        model = self.warm().eval()
        warm.put_on(model, adapter)
        found = [score(model, self.task, held_out, MICRO_BATCH) for held_out in self.held_out.values()]
        return {name: value for name, value in sum(found[1:], found[0]).figures.items() if isinstance(value, float)}


@cache
def read_once(place: Path) -> None:
    """From now on the models of this process look up what their frozen bodies have read."""
    if place.exists():
        LowerOnce.read.update(torch.load(place))
    kept = warm.kept_warm

    @lru_cache(maxsize=1)
    def looking_up(directory: Path, how: Any, *others: Any) -> Any:
        model, travelling = kept(directory, how, *others)
        bodies = [_body(one) for one in (model, load_model(directory, head=how.head))]
        LowerOnce(*bodies, len(layers_of(bodies[0])))
        return model, travelling

    warm.kept_warm = looking_up


def _body(model: Any) -> Any:
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(bare, bare.base_model_prefix)
