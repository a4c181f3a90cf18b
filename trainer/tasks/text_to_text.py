"""A text into another one, by a decoder or by an encoder-decoder: translation and summarisation."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from configs.schema.tasks import TaskSpec
from trainer.data.languages import count_unknown
from trainer.tasks.marked import own_backend, words_of
from trainer.tasks.task import IGNORED, Encoded, Opening, Row
from trainer.tasks.text import padded, random_ids
from trainer.tasks.written import WrittenAnswerTask, asked_of, filled, filled_up


class EncoderDecoderTask(WrittenAnswerTask):
    """The encoder reads what is asked, and the decoder learns the answer."""

    @cached_property
    def _backend(self) -> Any:
        """Adds the model's own special tokens around both texts. Words are text, whatever they spell."""
        backend = own_backend(self._tokenizer)
        backend.encode_special_tokens = True
        return backend

    def _encoded(self, row: Row) -> Encoded:
        asked, answer = filled(self._template, row)
        target = self._ended(self._backend.encode(answer.lstrip(" ")).ids)
        ids, words, cut = self._source(self._shown + asked)
        kept = tuple(target[: self.context_length])
        return Encoded(ids, len(asked), truncated=cut or len(kept) < len(target), target=kept, words=words)

    def _source(self, asked: str) -> tuple[tuple[int, ...], bytes, bool]:
        """Tokens of what is asked, which are words, and whether some were cut from the end; the last token stays."""
        found = self._backend.encode(asked.rstrip())
        whole = self._ended(found.ids)
        words = words_of(found)[: len(whole) - 1] + bytes(1)
        if len(whole) <= self.context_length:
            return tuple(whole), words, False
        most = self.context_length - 1
        return (*whole[:most], whole[-1]), words[:most] + bytes(1), True

    def _ended(self, ids: list[int]) -> list[int]:
        end = self._tokenizer.eos_token_id
        return ids if ids and ids[-1] == end else [*ids, end]

    def target_at(self, example: Encoded, _places: Sequence[int]) -> tuple[int, ...]:
        """The answer, whatever of the source is read."""
        return example.target

    def unknown(self, example: Encoded) -> tuple[int, int]:
        """Of both texts together."""
        return count_unknown(self._tokenizer, (*example.ids, *example.target))

    def opened(self, row: Row) -> Opening:
        """What is asked, of the fields before the answer."""
        ids, _, _ = self._source(asked_of(self._template, row))
        return Opening(ids, continued=False, ends=self.ends)

    def shape(self, example: Encoded) -> Any:
        """What both texts are padded to, in tokens."""
        return padded(len(example.ids), self.context_length), padded(len(example.target), self.context_length)

    def made_up(self, shape: Any, number: int) -> list[Encoded]:
        """Random tokens for both texts."""
        asked, answers = (random_ids(length, number, self.vocab_size, shortest=1) for length in shape)
        pairs = zip(asked, answers, strict=True)
        return [Encoded(ids, 0, truncated=False, target=target) for ids, target in pairs]

    def synthetic(self) -> list[Encoded]:
        """Made-up examples of two shapes."""
        short, long = padded(2, self.context_length), padded(20, self.context_length)
        return [*self.made_up((short, long), 2), *self.made_up((long, short), 1)]

    def collate(self, examples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``attention_mask`` (B, S), ``targets`` (B, T), padded on the right."""
        asked, answers = (max(lengths) for lengths in zip(*map(self.shape, examples), strict=True))
        return {
            "input_ids": filled_up([example.ids for example in examples], asked, 0),
            "attention_mask": filled_up([[1] * len(example.ids) for example in examples], asked, 0),
            "targets": filled_up([example.target for example in examples], answers, IGNORED),
        }

    def logits(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the model holds of each token of the targets, (B, T, V)."""
        before = model.prepare_decoder_input_ids_from_labels(labels=batch["targets"])
        asked = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits_BTV: torch.Tensor = model(**asked, decoder_input_ids=before).logits.float()
        return logits_BTV

    def asked(self, example: Encoded) -> tuple[int, ...]:
        """What the encoder reads."""
        return example.ids

    def references(self, examples: Sequence[Encoded]) -> list[str]:
        """The answers, as far as they fit the context."""
        return [self._text(example.target) for example in examples]

    def room(self, _example: Encoded) -> int:
        """Most tokens of an answer: the decoder has read nothing else."""
        return self.context_length

    def read(self, _asked: Sequence[int]) -> int:
        """The token that a decoder starts with."""
        return 1


class TranslationTask(WrittenAnswerTask):
    """A text in one language into another one."""

    name = "translation"
    default_template = "{source}\n\n{target}"

    @classmethod
    def with_encoder(cls, tokenizer: Any, context_length: int, spec: TaskSpec) -> EncoderDecoderTask:
        """The task for a model whose encoder reads what is asked."""
        template = spec.template or cls.default_template
        return EncoderDecoderTask(tokenizer, context_length, spec.model_copy(update={"template": template}))


class SummarisationTask(TranslationTask):
    """A text into a shorter one."""

    name = "summarisation"
    default_template = "{document}\n\n{summary}"
