"""What tasks.py measures: each task's data, and how a model is trained on them."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from configs.schema.federated import Train
from configs.schema.tasks import Pooling, TaskName, TaskSpec
from trainer.data.tokenizer import load_tokenizer
from trainer.tasks.fields import Answers
from trainer.tasks.likelihood import LikelihoodTask
from trainer.tasks.task import Encoded, Row, Task, kind_of

Unit = tuple[Encoded, ...]
Silos = dict[str, tuple[list[Unit], list[Encoded]]]
"""By name: units that train, and examples that are scored."""
Clipping = Literal["fixed", "automatic"]


@dataclass(frozen=True)
class Setting:
    """One task's data and how it is trained.

    Attributes:
        task: its name in Siloweave.
        rows: gives (silo, fields) of a folder of data; of a label its word.
        words: of the labels in a row.
        pooling: what a head looks at, if there is one.
        template: of the text before a label in words.
        train: what of the model.
        targets: of LoRA.
        rank: of LoRA.
        context: in tokens.
        records: of a silo, at most; what the plan takes a silo to have.
        held_out: of a silo.
        sampling_rate: of a step.
        rounds: of the federation.
        steps: of a silo in a round.
        rate: of Adam, with noise and without.
        norm: that gradients are clipped to.
        clipping: the clipping function.
        frozen: layers, from the lowest, that keep their weights, and the embeddings with them.
        augmentation: what a step changes in what it reads.
    """

    task: TaskName
    rows: Callable[[Path], Iterator[tuple[str, dict[str, Any]]]]
    words: Callable[[dict[str, Any]], list[str]] = lambda _: []
    pooling: Pooling = "model"
    template: str = ""
    train: Train = "lora"
    targets: tuple[str, ...] = ()
    rank: int = 4
    context: int = 48
    records: int = 2500
    held_out: int = 200
    sampling_rate: float = 0.1
    rounds: int = 3
    steps: int = 8
    rate: float = 2e-3
    norm: float = 1.0
    clipping: Clipping = "fixed"
    frozen: int = 0
    augmentation: dict[str, float] = field(default_factory=dict, hash=False)

    def spec(self, data: Path) -> TaskSpec:
        """The task with the labels that its data have."""
        labels = tuple(sorted({word for _, row in self.rows(data) for word in self.words(row)}))
        return TaskSpec(name=self.task, labels=labels, pooling=self.pooling, template=self.template)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _hashed(text: str, number: int) -> str:
    """A silo, of so many, that a text decides."""
    return f"silo-{hashlib.sha256(text.encode()).digest()[1] % number}"


def _snippets(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Four domains, which are the silos."""
    for row in _lines(folder / "vader_snippets" / "snippets.jsonl"):
        yield row["silo"], {"text": row["text"], "label": row["label"]}


def _intents(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for row in _lines(folder / "clinc150" / "train.jsonl"):
        yield _hashed(row["text"], 5), {"text": row["text"], "label": row["label"]}


def _entities(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for part in ("train", "dev", "test"):
        for row in _lines(folder / "wnut17" / f"{part}.jsonl"):
            yield _hashed(" ".join(row["tokens"]), 4), {name: tuple(row[name]) for name in ("tokens", "tags")}


def _questions(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Articles' questions, all of an article in one silo."""
    for row in _lines(folder / "xquad" / "qa.jsonl"):
        yield (
            _hashed(row["silo"], 4),
            {
                "context": row["context"],
                "question": row["question"],
                "answer": row["answers"],
            },
        )


def _texts(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for silo, row in _snippets(folder):
        yield silo, {"text": row["text"]}


SETTINGS = {
    "sentiment": Setting("classification", _snippets, lambda row: [row["label"]], "mean", train="head", rate=3e-2),
    "intent": Setting(
        "classification", _intents, lambda row: [row["label"]], "mean", train="head", context=32, rounds=4, rate=3e-2
    ),
    "entities": Setting(
        "entities",
        _entities,
        lambda row: list(row["tags"]),
        train="head",
        records=1200,
        sampling_rate=0.3,
        steps=60,
        rate=3e-2,
    ),
    "questions": Setting(
        "qa",
        _questions,
        train="head",
        context=256,
        records=250,
        held_out=40,
        sampling_rate=0.3,
        steps=20,
        rate=3e-2,
    ),
    "words": Setting(
        "classification",
        _snippets,
        lambda row: [row["label"]],
        "likelihood",
        "Review: {text}\nSentiment:",
        targets=("q_proj", "v_proj"),
        sampling_rate=0.04,
        steps=4,
        held_out=100,
    ),
    "texts": Setting(
        "causal",
        _texts,
        targets=("v_proj",),
        rank=2,
        sampling_rate=0.04,
        rounds=2,
        steps=4,
        rate=5e-3,
        held_out=50,
    ),
}


@cache
def task_of(model: Path, data: Path, used: Setting) -> Task:
    kind = LikelihoodTask if used.pooling == "likelihood" else kind_of(used.task)
    return kind(load_tokenizer(model), used.context, used.spec(data))


def numbered(row: dict[str, Any], labels: tuple[str, ...]) -> Row:
    """A row as a silo reads it: labels are numbers."""
    number = {word: index for index, word in enumerate(labels)}
    found = dict(row)
    if "label" in row:
        found["label"] = number[row["label"]]
    if "tags" in row:
        found["tags"] = tuple(number[tag] for tag in row["tags"])
    if "answer" in row:
        found["answer"] = Answers(*zip(*((one["text"], one["start"]) for one in row["answer"]), strict=True))
    return found


@cache
def silos(model: Path, data: Path, used: Setting) -> Silos:
    """What trains and what is held out at each silo, by a hash of the record."""
    task, found = task_of(model, data, used), defaultdict[str, Any](lambda: ([], []))
    labels = used.spec(data).labels
    hashes = {
        hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest(): (silo, row) for silo, row in used.rows(data)
    }
    for digest, (silo, row) in sorted(hashes.items()):
        units, held_out = found[silo]
        rows = [numbered(row, labels)]
        if digest[2] < 40 and len(held_out) < used.held_out:
            held_out += task.scored(rows)
        elif digest[2] >= 40 and len(units) < used.records and (examples := task.examples(rows)):
            units.append(examples)
    return dict(found)
