"""What a record is to a model, whatever the task; and the tasks there are, by name."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from configs.errors import InputError
from configs.storage.manifests import read_manifest
from trainer.data.tokenizer import load_tokenizer

IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """One record as tokens.

    Attributes:
        ids: the model's first token, the text's tokens, and end-of-text where it fits the context.
        characters: characters of the text that the tokens cover.
        truncated: whether the record was longer than the context.
    """

    ids: tuple[int, ...]
    characters: int
    truncated: bool


class Task(Protocol):
    """How text becomes a batch, and what a record's loss is: a function of that record alone.

    Attributes:
        name: by which settings, requests and policies name it.
        context_length: most tokens of a record.
    """

    name: str
    context_length: int

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""

    def encode(self, text: str) -> Encoded:
        """Tokens of a record, truncated to the context."""

    def padded_length(self, record: Encoded) -> int:
        """All that decides the shape of a record's computation; a function of that record alone."""

    def made_up(self, padded_length: int, number: int) -> list[Encoded]:
        """Records of a shape without any data, all different."""

    def collate(self, records: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """The records as one batch."""

    def record_nats(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Negative log-likelihood of each record in nats, shape (B,)."""

    def record_scores(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """For each record: nats, number of right predictions, number of predictions. Shape (B, 3), float64."""

    def record_losses(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Training loss of each record, shape (B,)."""


def _tasks() -> dict[str, Callable[[Any, int], Task]]:
    """Every task: from a tokenizer and a context length."""
    from trainer.tasks.text import CausalTask  # which needs the records above

    return {CausalTask.name: CausalTask}


def task_of(name: str, model_directory: Path) -> Task:
    """The task of that name, with the tokenizer and the context length of an exported model.

    Raises:
        InputError: there is no such task, or the model's manifest does not name a context length.
    """
    tasks = _tasks()
    if name not in tasks:
        raise InputError(f"task {name!r}: there is none of that name; give one of {', '.join(tasks)}")
    manifest = read_manifest(model_directory, "model")
    context_length = manifest.metadata.get("context_length") if manifest else None
    if not isinstance(context_length, int):
        raise InputError(
            f"{model_directory}: its manifest names no context_length; give a base model that `siloweave export` made"
        )
    return tasks[name](load_tokenizer(model_directory), context_length)


def by_length(records: Sequence[Encoded], micro_batch_size: int) -> Iterator[list[Encoded]]:
    """Micro-batches of records of like length: less padding, the same sum."""
    ordered = sorted(records, key=lambda record: len(record.ids))
    for start in range(0, len(ordered), micro_batch_size):
        yield list(ordered[start : start + micro_batch_size])
