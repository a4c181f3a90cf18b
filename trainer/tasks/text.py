"""What a record is to the model. Only a task knows how text becomes a batch, and what its loss is."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from trainer.data.tokenizer import first_token
from trainer.tasks.task import IGNORED, Encoded

# Records are padded to multiples of this many tokens. That depends on a record's own length alone, gives many records
# one shape, and fills whole vectors of the processor, in which no two records meet.
_BUCKET = 16


class CausalTask:
    """Next-token prediction inside one record; a sequence never crosses records."""

    name = "causal"

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self._tokenizer, self.context_length = tokenizer, context_length

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

    def encode(self, text: str) -> Encoded:
        """Tokens of a record between the model's first token and end-of-text, truncated to the context."""
        end = self._tokenizer.eos_token_id
        # The backend is called directly: the wrapper warns of long texts, and truncation is ours.
        ids = self._backend.encode(text, add_special_tokens=False).ids
        whole = [self._start, *ids, end]
        if len(whole) <= self.context_length:
            return Encoded(tuple(whole), len(text), truncated=False)
        kept = whole[: self.context_length]
        return Encoded(tuple(kept), len(self._tokenizer.decode(kept[1:])), truncated=True)

    def padded_length(self, record: Encoded) -> int:
        """What a record is padded to, in tokens: what decides the shape of its computation."""
        return min(self.context_length, -(-len(record.ids) // _BUCKET) * _BUCKET)

    def made_up(self, padded_length: int, number: int) -> list[Encoded]:
        """Records of random tokens that are padded to a length, all different."""
        rng = np.random.default_rng(padded_length)
        shortest = max(2, (padded_length - 1) // _BUCKET * _BUCKET + 1)
        lengths = rng.integers(shortest, padded_length, size=number, endpoint=True)
        rows = [rng.integers(self.vocab_size, size=length) for length in lengths]
        return [Encoded(tuple(row.tolist()), characters=len(row), truncated=False) for row in rows]

    def collate(self, records: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``targets``, both (B, T), padded on the right.

        No attention mask is needed: under a causal mask nothing attends to what comes after it.
        """
        longest = max(self.padded_length(record) for record in records)
        input_ids = torch.zeros((len(records), longest), dtype=torch.long)
        targets = torch.full((len(records), longest), IGNORED, dtype=torch.long)
        for row, record in enumerate(records):
            ids = torch.tensor(record.ids)
            input_ids[row, : len(ids)] = ids
            targets[row, : len(ids) - 1] = ids[1:]
        return {"input_ids": input_ids, "targets": targets}

    def record_nats(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Negative log-likelihood of each record in nats, shape (B,)."""
        return _nats(model(input_ids=batch["input_ids"]).logits.float(), batch["targets"])

    def record_scores(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """For each record: nats, number of tokens that were the likeliest, number of tokens. Shape (B, 3), float64."""
        logits_BTV, targets = model(input_ids=batch["input_ids"]).logits.float(), batch["targets"]
        correct = (logits_BTV.argmax(dim=2) == targets).sum(dim=1)
        tokens = (targets != IGNORED).sum(dim=1)
        return torch.stack([_nats(logits_BTV, targets).double(), correct.double(), tokens.double()], dim=1)

    def record_losses(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Training loss of each record, shape (B,): nats per token, a function of that record alone."""
        return self.record_nats(model, batch) / (batch["targets"] != IGNORED).sum(dim=1)


def _nats(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    # Row by row of the vocabulary: across it, how numbers are shared among threads would depend on the batch.
    losses_N = functional.cross_entropy(
        logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses_N.view_as(targets_BT).sum(dim=1)
