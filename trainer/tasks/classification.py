"""Which label a text has, or which labels: a head on what the model makes of the text, be it encoder or decoder."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from configs.errors import InputError
from configs.schema.tasks import TaskSpec
from trainer.models.load import Head
from trainer.tasks import fields
from trainer.tasks.measures import Measures, Ratio
from trainer.tasks.task import Encoded, Row
from trainer.tasks.text import padded, random_ids

_MOST_NATS = 8.0


class ClassificationTask:
    """One label for a text. Each row of a unit is an example of its own."""

    name = "classification"

    def __init__(self, tokenizer: Any, context_length: int, spec: TaskSpec) -> None:
        self._tokenizer, self.context_length, self._spec = tokenizer, context_length, spec
        if self._pad is None:
            raise InputError("tokenizer: it has neither a pad token nor an end-of-text token; name one in its files")
        self.head = Head("classification", len(spec.labels), self._pad)
        self.measures = self.measured(spec, context_length)

    @classmethod
    def fields(cls, spec: TaskSpec) -> dict[str, fields.Kind]:
        """The text or the fields of its template, and the label."""
        return {**dict.fromkeys(spec.fields or ("text",), fields.text), "label": fields.label}

    @staticmethod
    def measured(spec: TaskSpec, _context_length: int) -> Measures:
        """Accuracy, the mean loss, and F1 by label: an example is one true positive, or one false of both kinds."""
        bounds = {"correct": 1.0, "nats": _MOST_NATS, "examples": 1.0}
        ratios = {
            "accuracy": Ratio({"correct": 1.0}, {"examples": 1.0}),
            "loss": Ratio({"nats": 1.0}, {"examples": 1.0}),
        }
        return Measures(bounds, ratios, spec.labels, counts_norm=math.sqrt(2))

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""
        return len(self._tokenizer)

    @cached_property
    def _pad(self) -> int | None:
        pad: int | None = self._tokenizer.pad_token_id
        return self._tokenizer.eos_token_id if pad is None else pad

    @cached_property
    def _backend(self) -> Any:
        """Adds the model's own special tokens, and cuts what is too long. Words are text, whatever they spell."""
        self._tokenizer.split_special_tokens = self._tokenizer.backend_tokenizer.encode_special_tokens = True
        backend = self._tokenizer.backend_tokenizer
        backend.no_padding()
        backend.enable_truncation(self.context_length)
        return backend

    def examples(self, rows: Sequence[Row]) -> tuple[Encoded, ...]:
        """One for each row."""
        return tuple(self._encoded(row) for row in rows)

    def _encoded(self, row: Row) -> Encoded:
        text = self._spec.template.format_map(row) if self._spec.template else row["text"]
        found = self._backend.encode(text)
        # A tokenizer may make nothing of a text: the model still reads one token.
        return Encoded(tuple(found.ids) or (self._pad or 0,), len(text), bool(found.overflowing), self._target(row))

    def _target(self, row: Row) -> tuple[int, ...]:
        return (row["label"],)

    def shape(self, example: Encoded) -> int:
        """What an example is padded to, in tokens."""
        return padded(len(example.ids), self.context_length)

    def made_up(self, shape: int, number: int) -> list[Encoded]:
        """Random tokens, and labels one after the other."""
        rows = random_ids(shape, number, self.vocab_size, shortest=1)
        return [Encoded(ids, len(ids), truncated=False, target=self._made_up(n)) for n, ids in enumerate(rows)]

    def _made_up(self, number: int) -> tuple[int, ...]:
        return (number % len(self._spec.labels),)

    def synthetic(self) -> list[Encoded]:
        """Made-up examples of two shapes."""
        return [*self.made_up(padded(1, self.context_length), 2), *self.made_up(padded(20, self.context_length), 1)]

    def collate(self, examples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``attention_mask`` (B, T), padded on the right; ``targets`` (B, 1)."""
        longest = max(self.shape(example) for example in examples)
        input_ids = torch.full((len(examples), longest), self._pad or 0, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, example in enumerate(examples):
            input_ids[row, : len(example.ids)] = torch.tensor(example.ids)
            attention_mask[row, : len(example.ids)] = 1
        targets = torch.tensor([self._row(example) for example in examples])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "targets": targets}

    def _row(self, example: Encoded) -> Sequence[int]:
        return example.target

    def record_losses(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Nats of each example's own label, shape (B,)."""
        return self._nats(_logits(model, batch), batch["targets"])

    def _nats(self, logits_BL: torch.Tensor, targets_B1: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits_BL, targets_B1.squeeze(1), reduction="none")

    def record_scores(self, model: Any, examples: Sequence[Encoded]) -> torch.Tensor:
        """For each example: right or not, nats, one; then the counts of each label. Shape (B, 3 + 3 L), float64."""
        batch = self.collate(examples)
        logits_BL = _logits(model, batch)
        answers_BL, truths_BL = self._chosen(logits_BL), self._truths(batch["targets"])
        counts = (answers_BL & truths_BL, answers_BL & ~truths_BL, truths_BL & ~answers_BL)
        right_B = (answers_BL == truths_BL).all(dim=1)
        nats_B = self._nats(logits_BL, batch["targets"])
        sums = torch.stack([right_B.double(), nats_B.double(), torch.ones(len(examples), dtype=torch.float64)], dim=1)
        return torch.cat([sums, *(found.double() for found in counts)], dim=1)

    def _chosen(self, logits_BL: torch.Tensor) -> torch.Tensor:
        likeliest = torch.nan_to_num(logits_BL, nan=-math.inf).argmax(dim=1)
        return torch.nn.functional.one_hot(likeliest, logits_BL.shape[1]).bool()

    def _truths(self, targets_B1: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(targets_B1.squeeze(1), len(self._spec.labels)).bool()


class MultilabelTask(ClassificationTask):
    """Any number of labels for a text: each is a question of its own."""

    name = "multilabel"

    @classmethod
    def fields(cls, spec: TaskSpec) -> dict[str, fields.Kind]:
        """The text or the fields of its template, and the labels."""
        return {**dict.fromkeys(spec.fields or ("text",), fields.text), "labels": fields.label_set}

    @staticmethod
    def measured(spec: TaskSpec, context_length: int) -> Measures:
        """As for one label; an example counts once for each label at most. Correct is an answer without a mistake."""
        one = ClassificationTask.measured(spec, context_length)
        bounds = {**one.bounds, "nats": _MOST_NATS * len(spec.labels)}
        return Measures(bounds, one.ratios, spec.labels, counts_norm=math.sqrt(len(spec.labels)))

    def _target(self, row: Row) -> tuple[int, ...]:
        return tuple(row["labels"])

    def _made_up(self, number: int) -> tuple[int, ...]:
        return tuple(range(number % (len(self._spec.labels) + 1)))

    def _row(self, example: Encoded) -> Sequence[int]:
        return [int(label in example.target) for label in range(len(self._spec.labels))]

    def _nats(self, logits_BL: torch.Tensor, targets_BL: torch.Tensor) -> torch.Tensor:
        # Two answers to each question, row by row: how a sigmoid's numbers are shared among threads would depend on
        # the batch.
        pairs_BL2 = torch.stack([torch.zeros_like(logits_BL), logits_BL], dim=2)
        nats_N = torch.nn.functional.cross_entropy(pairs_BL2.flatten(0, 1), targets_BL.flatten(), reduction="none")
        return nats_N.view_as(targets_BL).sum(dim=1)

    def _chosen(self, logits_BL: torch.Tensor) -> torch.Tensor:
        return logits_BL > 0

    def _truths(self, targets_BL: torch.Tensor) -> torch.Tensor:
        return targets_BL.bool()


def _logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits_BL: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits_BL.float()
