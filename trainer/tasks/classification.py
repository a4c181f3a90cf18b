"""Which label a text has, or which labels: a head on what the model makes of the text, be it encoder or decoder."""

import copy
import math
from collections.abc import Sequence
from typing import Any, Self

import torch

from configs.schema.tasks import TaskSpec
from trainer.metrics.measures import Measures, Ratio
from trainer.tasks import fields
from trainer.tasks.headed import HeadedTask, logits_of
from trainer.tasks.marked import words_of
from trainer.tasks.task import Calibration, Encoded, Prediction, Row

_MOST_NATS = 8.0


class ClassificationTask(HeadedTask):
    """One label for a text. Each row of a unit is an example of its own."""

    name = "classification"

    def __init__(self, tokenizer: Any, context_length: int, spec: TaskSpec) -> None:
        super().__init__(tokenizer, context_length, spec)
        self.measures, self._calibration = self.measured(spec, context_length), Calibration()

    def calibrated(self, calibration: Calibration) -> Self:
        """The same task, whose answers and scores are of what the model says divided by a temperature."""
        other = copy.copy(self)
        other._calibration = calibration
        return other

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

    def examples(self, rows: Sequence[Row]) -> tuple[Encoded, ...]:
        """One for each row."""
        return tuple(self._encoded(row) for row in rows)

    scored = examples

    def _encoded(self, row: Row) -> Encoded:
        text = self._spec.template.format_map(row) if self._spec.template else row["text"]
        found = self.backend.encode(text)
        # A tokenizer may make nothing of a text: the model still reads one token.
        ids, words = tuple(found.ids) or (self.pad,), words_of(found) or bytes(1)
        return Encoded(ids, len(text), bool(found.overflowing), self._target(row), words)

    def target_at(self, example: Encoded, _places: Sequence[int]) -> tuple[int, ...]:
        """The label, whatever of the text is read."""
        return example.target

    def _target(self, row: Row) -> tuple[int, ...]:
        return (row["label"],)

    def with_target(self, ids: tuple[int, ...], number: int) -> Encoded:
        """A made-up example, whose label is the next one."""
        return Encoded(ids, len(ids), truncated=False, target=self._made_up(number))

    def _made_up(self, number: int) -> tuple[int, ...]:
        return (number % len(self._spec.labels),)

    def collate(self, examples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``attention_mask`` (B, T), padded on the right; ``targets`` (B, 1)."""
        return {**self.inputs(examples), "targets": self._targets(examples)}

    def _targets(self, examples: Sequence[Encoded]) -> torch.Tensor:
        return torch.tensor([self._row(example) for example in examples])

    def _row(self, example: Encoded) -> Sequence[int]:
        return example.target

    def record_losses(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Nats of each example's own label, shape (B,)."""
        return self._nats(logits_of(model, batch), batch["targets"])

    def _nats(self, logits_BL: torch.Tensor, targets_B1: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits_BL, targets_B1.squeeze(1), reduction="none")

    def judged(self, model: Any, examples: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the head says of each label (B, L), and whether each is right (B, L)."""
        batch = self.collate(examples)
        return self._read(model, batch), self._truths(batch["targets"])

    def _read(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return logits_of(model, batch) / self._calibration.temperature

    def record_scores(self, model: Any, examples: Sequence[Encoded]) -> torch.Tensor:
        """For each example: right or not, nats, one; then the counts of each label. Shape (B, 3 + 3 L), float64."""
        batch = self.collate(examples)
        logits_BL = self._read(model, batch)
        answers_BL, truths_BL = self._chosen(logits_BL), self._truths(batch["targets"])
        return scores_of(answers_BL, truths_BL, self._nats(logits_BL, batch["targets"]))

    def predictions(self, model: Any, examples: Sequence[Encoded], _max_new_tokens: int) -> list[Prediction]:
        """The labels that the model chooses, with the probability of each label that there is."""
        logits_BL = self._read(model, self.collate(examples))
        found = zip(self._chosen(logits_BL), self._probabilities(logits_BL).tolist(), strict=True)
        return [Prediction(self._named(chosen_L), tuple(probabilities)) for chosen_L, probabilities in found]

    def references(self, examples: Sequence[Encoded]) -> list[Any]:
        """The examples' own labels."""
        return [self._named(truth_L) for truth_L in self._truths(self._targets(examples))]

    def _named(self, has_L: torch.Tensor) -> str | tuple[str, ...]:
        return self._spec.labels[int(has_L.int().argmax())]

    def _probabilities(self, logits_BL: torch.Tensor) -> torch.Tensor:
        return logits_BL.double().softmax(dim=1)

    def _chosen(self, logits_BL: torch.Tensor) -> torch.Tensor:
        return likeliest(logits_BL)

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

    def _named(self, has_L: torch.Tensor) -> tuple[str, ...]:
        return tuple(label for label, has in zip(self._spec.labels, has_L.tolist(), strict=True) if has)

    def _probabilities(self, logits_BL: torch.Tensor) -> torch.Tensor:
        return logits_BL.double().sigmoid()

    def _chosen(self, logits_BL: torch.Tensor) -> torch.Tensor:
        if not self._calibration.thresholds:
            return logits_BL > 0
        return self._probabilities(logits_BL) > torch.tensor(self._calibration.thresholds, dtype=torch.float64)

    def _truths(self, targets_BL: torch.Tensor) -> torch.Tensor:
        return targets_BL.bool()


def likeliest(logits_BL: torch.Tensor) -> torch.Tensor:
    """The label of each row that the model holds likeliest, as a row of truth values; of several the first."""
    found_B = torch.nan_to_num(logits_BL, nan=-math.inf).argmax(dim=1)
    return torch.nn.functional.one_hot(found_B, logits_BL.shape[1]).bool()


def scores_of(answers_BL: torch.Tensor, truths_BL: torch.Tensor, nats_B: torch.Tensor) -> torch.Tensor:
    """For each row: right or not, nats, one; then the counts of each label. Shape (B, 3 + 3 L), float64."""
    right_B = (answers_BL == truths_BL).all(dim=1)
    sums_B3 = torch.stack([right_B.double(), nats_B.double(), torch.ones_like(nats_B, dtype=torch.float64)], dim=1)
    counts = (answers_BL & truths_BL, answers_BL & ~truths_BL, truths_BL & ~answers_BL)
    return torch.cat([sums_B3, *(found.double() for found in counts)], dim=1)
