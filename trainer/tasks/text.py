"""What a record is to the model. Only a task knows how text becomes a batch, and what its loss is."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from configs.schema.tasks import CAUSAL, TaskSpec
from trainer.data.languages import count_unknown
from trainer.data.tokenizer import first_token
from trainer.metrics.measures import Measures, Ratio
from trainer.models.load import Head
from trainer.tasks import fields
from trainer.tasks.task import IGNORED, Encoded, Opening, Row

# Records are padded to multiples of this many tokens. That depends on a record's own length alone, gives many records
# one shape, and fills whole vectors of the processor, in which no two records meet.
_BUCKET = 16
_NATS_PER_TOKEN = 8.0  # a unit's mean above this counts as this: a uniform guess among 3,000 tokens
_CHARACTERS_PER_TOKEN = 8.0


class CausalTask:
    """Next-token prediction inside one record; a sequence never crosses records.

    The rows of a unit are one text: a unit is one example.
    """

    name = "causal"
    head: Head | None = None

    def __init__(self, tokenizer: Any, context_length: int, spec: TaskSpec = CAUSAL) -> None:
        self._tokenizer, self.context_length = tokenizer, context_length
        self.measures = self.measured(spec, context_length)

    @staticmethod
    def fields(_spec: TaskSpec) -> dict[str, fields.Kind]:
        """The text."""
        return {"text": fields.text}

    @staticmethod
    def misfit(_row: Row) -> str:
        """A text fits itself."""
        return ""

    @staticmethod
    def measured(_spec: TaskSpec, context_length: int) -> Measures:
        """Bits per character and next-token accuracy."""
        bounds = {
            "nats": _NATS_PER_TOKEN * context_length,
            "characters": _CHARACTERS_PER_TOKEN * context_length,
            "correct tokens": float(context_length),
            "tokens": float(context_length),
        }
        ratios = {
            "bits_per_char": Ratio({"nats": 1 / math.log(2)}, {"characters": 1.0}),
            "accuracy": Ratio({"correct tokens": 1.0}, {"tokens": 1.0}),
        }
        return Measures(bounds, ratios, lower_is_better=True)

    @cached_property
    def _backend(self) -> Any:
        """What turns text into tokens. A record's words are text, also where they spell one of the special tokens."""
        # Both: the wrapper, whenever it is called, gives the backend its own value.
        self._tokenizer.split_special_tokens = self._tokenizer.backend_tokenizer.encode_special_tokens = True
        return self._tokenizer.backend_tokenizer

    @cached_property
    def _start(self) -> int:
        return first_token(self._tokenizer)

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""
        return len(self._tokenizer)

    def unknown(self, example: Encoded) -> tuple[int, int]:
        """How many of an example's tokens stand for what the tokenizer doesn't know, and how many there are."""
        return count_unknown(self._tokenizer, example.ids)

    def examples(self, rows: Sequence[Row]) -> tuple[Encoded, ...]:
        """One: the texts of all rows."""
        return (self.encode(joined(rows)),)

    scored = examples

    def encode(self, text: str) -> Encoded:
        """Tokens of a record between the model's first token and end-of-text, truncated to the context."""
        end = self._tokenizer.eos_token_id
        # The backend is called directly: the wrapper warns of long texts, and truncation is ours.
        ids = self._backend.encode(text, add_special_tokens=False).ids
        whole = [self._start, *ids, end]
        if len(whole) <= self.context_length:
            return Encoded(tuple(whole), len(text), truncated=False)
        kept = whole[: self.context_length]
        text = self._tokenizer.decode(kept[1:], clean_up_tokenization_spaces=False)
        return Encoded(tuple(kept), len(text), truncated=True)

    def opening(self, prompt: str) -> Opening:
        """How a text starts, which the model goes on with."""
        ids = self._backend.encode(prompt, add_special_tokens=False).ids
        return Opening((self._start, *ids), continued=True, ends=(self._tokenizer.eos_token_id,))

    def opened(self, row: Row) -> Opening:
        """The text so far as how it starts."""
        return self.opening(row["text"])

    def shape(self, record: Encoded) -> int:
        """What a record is padded to, in tokens: what decides the shape of its computation."""
        return padded(len(record.ids), self.context_length)

    def made_up(self, shape: int, number: int) -> list[Encoded]:
        """Records of random tokens that are padded to a length, all different."""
        rows = random_ids(shape, number, self.vocab_size, shortest=2)
        return [Encoded(ids, characters=len(ids), truncated=False) for ids in rows]

    def synthetic(self) -> list[Encoded]:
        """Three made-up texts of different lengths."""
        return [self.encode(" ".join(map(str, range(start, start + 3 + start)))) for start in range(3)]

    def collate(self, records: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``targets``, both (B, T), padded on the right.

        No attention mask is needed: under a causal mask nothing attends to what comes after it.
        """
        longest = max(self.shape(record) for record in records)
        input_ids = torch.zeros((len(records), longest), dtype=torch.long)
        targets = torch.full((len(records), longest), IGNORED, dtype=torch.long)
        for row, record in enumerate(records):
            ids = torch.tensor(record.ids)
            input_ids[row, : len(ids)] = ids
            targets[row, : len(ids) - 1] = ids[1:]
        return {"input_ids": input_ids, "targets": targets}

    def record_nats(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Negative log-likelihood of each record in nats, shape (B,)."""
        return token_nats(model(input_ids=batch["input_ids"]).logits.float(), batch["targets"])

    def record_scores(self, model: Any, records: Sequence[Encoded]) -> torch.Tensor:
        """For each record: nats, characters, tokens that were held likeliest, tokens. Shape (B, 4), float64."""
        batch = self.collate(records)
        logits_BTV, targets = model(input_ids=batch["input_ids"]).logits.float(), batch["targets"]
        correct = (logits_BTV.argmax(dim=2) == targets).sum(dim=1)
        tokens = (targets != IGNORED).sum(dim=1)
        characters = torch.tensor([record.characters for record in records])
        found = (token_nats(logits_BTV, targets), characters, correct, tokens)
        return torch.stack([values_B.double() for values_B in found], dim=1)

    def record_losses(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Training loss of each record, shape (B,): nats per token, a function of that record alone."""
        return self.record_nats(model, batch) / (batch["targets"] != IGNORED).sum(dim=1)


def joined(rows: Sequence[Row]) -> str:
    """The texts of a unit's rows as one."""
    return "\n\n".join(row["text"] for row in rows)


def padded(length: int, longest: int) -> int:
    """What so many tokens are padded to."""
    return min(longest, -(-length // _BUCKET) * _BUCKET)


def random_ids(shape: int, number: int, vocab_size: int, shortest: int) -> list[tuple[int, ...]]:
    """Rows of random tokens, of the lengths that are padded to ``shape``."""
    rng = np.random.default_rng(shape)
    least = max(shortest, (shape - 1) // _BUCKET * _BUCKET + 1)
    lengths = rng.integers(least, max(least, shape), size=number, endpoint=True)
    return [tuple(rng.integers(vocab_size, size=length).tolist()) for length in lengths]


def token_nats(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each row's targets in nats, shape (B,)."""
    # Row by row of the vocabulary: across it, how numbers are shared among threads would depend on the batch.
    losses_N = functional.cross_entropy(
        logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses_N.view_as(targets_BT).sum(dim=1)
