"""What tasks share that answer by a head of their own: tokens of a text, padding, made-up examples."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from configs.errors import InputError
from configs.schema.tasks import TaskSpec
from trainer.data.languages import count_unknown
from trainer.models.load import Head, HeadKind
from trainer.tasks.task import Encoded, Row
from trainer.tasks.text import padded, random_ids

_KINDS: dict[str, HeadKind] = {
    "classification": "classification",
    "multilabel": "classification",
    "entities": "token classification",
    "qa": "question answering",
}


def head_of(spec: TaskSpec, pad: int = 0) -> Head | None:
    """What a task puts in the place of a model's words, two numbers where it has no labels; None: nothing."""
    if spec.in_words:
        return None
    return Head(_KINDS[spec.name], len(spec.labels) or 2, pad, spec.labels, spec.pooling)


class HeadedTask:
    """A model's tokenizer, and batches that its pad token fills up."""

    least = 1
    """Fewest tokens of an example."""

    def __init__(self, tokenizer: Any, context_length: int, spec: TaskSpec) -> None:
        self._tokenizer, self.context_length, self._spec = tokenizer, context_length, spec
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if pad is None:
            raise InputError("tokenizer: it has neither a pad token nor an end-of-text token; name one in its files")
        self.pad: int = pad
        self.head = head_of(spec, pad)

    @staticmethod
    def misfit(_row: Row) -> str:
        """What does not fit together in a record: nothing, where any target fits any text."""
        return ""

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""
        return len(self._tokenizer)

    @property
    def mask_token(self) -> int | None:
        """What stands in place of a token that is not shown, in models that have learnt with one."""
        token: int | None = self._tokenizer.mask_token_id
        return token

    def unknown(self, example: Encoded) -> tuple[int, int]:
        """How many of an example's tokens stand for what the tokenizer doesn't know, and how many there are."""
        return count_unknown(self._tokenizer, example.ids)

    @cached_property
    def backend(self) -> Any:
        """Adds the model's own special tokens, and cuts what is too long. Words are text, whatever they spell."""
        self._tokenizer.split_special_tokens = self._tokenizer.backend_tokenizer.encode_special_tokens = True
        backend = self._tokenizer.backend_tokenizer
        backend.no_padding()
        backend.enable_truncation(self.context_length)
        return backend

    def shape(self, example: Encoded) -> int:
        """What an example is padded to, in tokens."""
        return padded(len(example.ids), self.context_length)

    def made_up(self, shape: int, number: int) -> list[Encoded]:
        """Random tokens, each with another target than the one before."""
        rows = random_ids(shape, number, self.vocab_size, shortest=self.least)
        return [self.with_target(ids, place) for place, ids in enumerate(rows)]

    def with_target(self, ids: tuple[int, ...], number: int) -> Encoded:
        """A made-up example of these tokens."""
        raise NotImplementedError

    def synthetic(self) -> list[Encoded]:
        """Made-up examples of two shapes."""
        return [*self.made_up(padded(1, self.context_length), 2), *self.made_up(padded(20, self.context_length), 1)]

    def inputs(self, examples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``attention_mask`` (B, T), padded on the right."""
        ids = self.filled(examples, [example.ids for example in examples], self.pad)
        mask = self.filled(examples, [[1] * len(example.ids) for example in examples], 0)
        return {"input_ids": ids, "attention_mask": mask}

    def filled(self, examples: Sequence[Encoded], rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
        """A row of numbers for each example, filled up with a value to the length of the longest example (B, T)."""
        length = max(self.shape(example) for example in examples)
        return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])


def logits_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the head says of a batch, in float32."""
    logits: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.float()
