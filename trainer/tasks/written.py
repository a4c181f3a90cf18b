"""Answers to what is asked: the model reads all of an example, and learns the words of the answer alone."""

import string
from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from typing import Any, Self

import torch

from configs.schema.tasks import TaskSpec
from trainer.data.languages import count_unknown
from trainer.data.tokenizer import first_token
from trainer.metrics.chrf import chrf
from trainer.metrics.measures import Measures, Ratio
from trainer.models.load import Head
from trainer.tasks import fields
from trainer.tasks.marked import Mark, Marked, Part, encoded, plain_backend
from trainer.tasks.task import IGNORED, Encoded, Opening, Prediction, Row
from trainer.tasks.text import padded, random_ids, token_nats

# Whatever a model's own generation_config.json says: one way to go on, and no end or length but ours.
_GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "early_stopping": False,
    "num_return_sequences": 1,
    "min_length": 0,
    "min_new_tokens": None,
    "max_time": None,
    "stop_strings": None,
}
_MOST_NATS = 8.0  # of a token: a uniform guess among 3,000 tokens


class WrittenAnswerTask:
    """A decoder goes on with a template up to its last field, which is the answer. Each row is an example."""

    name = ""
    default_template = ""
    head: Head | None = None

    def __init__(self, tokenizer: Any, context_length: int, spec: TaskSpec) -> None:
        self._tokenizer, self.context_length = tokenizer, context_length
        self._template = spec.template or self.default_template
        self._shown, self._how = "", _GREEDY
        self.measures = self.measured(spec, context_length)

    @classmethod
    def fields(cls, spec: TaskSpec) -> dict[str, fields.Kind]:
        """The fields of the template."""
        return dict.fromkeys(TaskSpec(template=spec.template or cls.default_template).fields, fields.text)

    @staticmethod
    def misfit(_row: Row) -> str:
        """A question fits any answer."""
        return ""

    @staticmethod
    def measured(_spec: TaskSpec, _context_length: int) -> Measures:
        """Nats per token of the answer, and the share of its tokens that the model held likeliest.

        Every answer counts the same, however long: as sums of tokens, most would be far below what the longest answer
        could add, and noise is measured by that.
        """
        bounds = {"nats per token": _MOST_NATS, "share of tokens": 1.0, "examples": 1.0}
        ratios = {
            "nats_per_token": Ratio({"nats per token": 1.0}, {"examples": 1.0}),
            "accuracy": Ratio({"share of tokens": 1.0}, {"examples": 1.0}),
        }
        return Measures(bounds, ratios, lower_is_better=True)

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""
        return len(self._tokenizer)

    def unknown(self, example: Encoded) -> tuple[int, int]:
        """How many of an example's tokens stand for what the tokenizer doesn't know, and how many there are."""
        return count_unknown(self._tokenizer, example.ids)

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return (self._tokenizer.eos_token_id,)

    @cached_property
    def _backend(self) -> Any:
        return plain_backend(self._tokenizer)

    def examples(self, rows: Sequence[Row]) -> tuple[Encoded, ...]:
        """One for each row of which some of the answer fits the context."""
        return tuple(found for row in rows if (found := self._encoded(row)) is not None)

    scored = examples

    def with_shots(self, rows: Sequence[Row]) -> Self:
        """The same task, with these worked examples before each prompt."""
        found = copy(self)
        found._shown = "".join(f"{''.join(filled(self._template, row))}\n\n" for row in rows)
        return found

    def decoded(self, beams: int, repetition_penalty: float) -> Self:
        """The same task, whose predictions are written by a search with so many beams and such a penalty."""
        found = copy(self)
        found._how = {**_GREEDY, "num_beams": beams, "repetition_penalty": repetition_penalty}
        return found

    def _encoded(self, row: Row) -> Encoded | None:
        asked, answer = filled(self._template, row)
        parts = [(self._shown + asked, Mark.READ), (answer, Mark.LEARNT)]
        return self._tokens(parts, ended=True).example(self.context_length)

    def _tokens(self, parts: Sequence[Part], *, ended: bool) -> Marked:
        found = Marked([first_token(self._tokenizer)], [Mark.FRAME])
        found.add(*encoded(self._backend, parts))
        if ended:
            found.add([self._tokenizer.eos_token_id], [Mark.LEARNT])
        return found

    def opening(self, prompt: str) -> Opening:
        """The prompt as what is asked."""
        return self.opened(with_prompt(self._template, prompt))

    def opened(self, row: Row) -> Opening:
        """What is asked, of the fields before the answer."""
        asked = self._tokens([(asked_of(self._template, row), Mark.READ)], ended=False)
        return Opening(tuple(asked.ids), continued=False, ends=self.ends)

    @property
    def mask_token(self) -> int | None:
        """What stands in place of a token that is not shown, in models that have learnt with one."""
        token: int | None = self._tokenizer.mask_token_id
        return token

    def target_at(self, example: Encoded, places: Sequence[int]) -> tuple[int, ...]:
        """What is learnt stands beside the tokens themselves."""
        return tuple(example.target[place] for place in places)

    def shape(self, example: Encoded) -> Any:
        """What an example is padded to, in tokens."""
        return padded(len(example.ids), self.context_length)

    def made_up(self, shape: Any, number: int) -> list[Encoded]:
        """Random tokens, the latter half of which are an answer."""
        rows = random_ids(shape, number, self.vocab_size, shortest=2)
        return [Encoded(ids, 0, truncated=False, target=_latter_half(ids)) for ids in rows]

    def synthetic(self) -> list[Encoded]:
        """Made-up examples of two shapes."""
        return [*self.made_up(padded(2, self.context_length), 2), *self.made_up(padded(20, self.context_length), 1)]

    def collate(self, examples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``targets``, both (B, T), padded on the right, where nothing attends to."""
        longest = max(self.shape(example) for example in examples)
        followed = [(*example.target[1:], IGNORED) for example in examples]
        input_ids = filled_up([example.ids for example in examples], longest, 0)
        return {"input_ids": input_ids, "targets": filled_up(followed, longest, IGNORED)}

    def logits(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the model holds of each token of the targets, (B, T, V)."""
        logits_BTV: torch.Tensor = model(input_ids=batch["input_ids"]).logits.float()
        return logits_BTV

    def record_losses(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Nats per token of each answer, shape (B,)."""
        return _nats_per_token(self.logits(model, batch), batch["targets"])

    def record_scores(self, model: Any, examples: Sequence[Encoded]) -> torch.Tensor:
        """For each answer: nats per token, share of tokens held likeliest, one. Shape (B, 3), float64."""
        batch = self.collate(examples)
        logits_BTV, targets_BT = self.logits(model, batch), batch["targets"]
        correct_B = (logits_BTV.argmax(dim=2) == targets_BT).sum(dim=1) / _tokens_of(targets_BT)
        found = (_nats_per_token(logits_BTV, targets_BT), correct_B, torch.ones(len(examples)))
        return torch.stack([values_B.double() for values_B in found], dim=1)

    def predictions(self, model: Any, examples: Sequence[Encoded], max_new_tokens: int) -> list[Prediction]:
        """What the model writes where each example's last answer stands: likeliest tokens, or as ``decoded`` says."""
        return [Prediction(self._written(model, example, max_new_tokens, self.ends, self._how)) for example in examples]

    def overlaps(self, model: Any, examples: Sequence[Encoded], max_new_tokens: int) -> list[float]:
        """What the same texts have in common with the right answers, by chrF.

        It writes as many tokens for each, also after it has ended its answer: how long that takes does not tell where.
        """
        written = [self._written(model, example, max_new_tokens, (), _GREEDY) for example in examples]
        return [chrf(mine, right) for mine, right in zip(written, self.references(examples), strict=True)]

    def references(self, examples: Sequence[Encoded]) -> list[str]:
        """The last answers of the examples themselves, as far as they fit the context."""
        return [self._text(example.target[len(self.asked(example)) :]) for example in examples]

    def asked(self, example: Encoded) -> tuple[int, ...]:
        """What is read before the last answer."""
        place = len(example.ids)
        while example.target[place - 1] != IGNORED:
            place -= 1
        return example.ids[:place]

    def room(self, example: Encoded) -> int:
        """Most tokens that can follow what is asked."""
        return self.context_length - len(self.asked(example))

    def read(self, asked: Sequence[int]) -> int:
        """How many of the tokens that transformers gives back were not written: it repeats what a decoder has read."""
        return len(asked)

    def _written(
        self, model: Any, example: Encoded, max_new_tokens: int, ends: Sequence[int], how: Mapping[str, Any]
    ) -> str:
        asked = self.asked(example)
        most = min(max_new_tokens, self.room(example))
        tokens = _generated(model, asked, most, ends, how)[self.read(asked) :]
        ended = next((place for place, token in enumerate(tokens) if token in self.ends), len(tokens))
        return self._text(tokens[:ended])

    def _text(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).strip()


def _generated(
    model: Any, ids: Sequence[int], max_new_tokens: int, ends: Sequence[int], how: Mapping[str, Any]
) -> list[int]:
    """What a model goes on with, for one text alone: no other one, and no padding, is near it."""
    read = torch.tensor([list(ids)])
    with torch.no_grad():
        found = model.generate(
            input_ids=read,
            attention_mask=torch.ones_like(read),
            max_new_tokens=max_new_tokens,
            eos_token_id=list(ends) or None,
            pad_token_id=ends[0] if ends else None,
            use_cache=True,
            **how,
        )
    tokens: list[int] = found[0].tolist()
    return tokens


def filled(template: str, row: Mapping[str, Any]) -> tuple[str, str]:
    """What is asked, and the answer with all that follows it.

    Spaces between them are the answer's: most tokenizers make one token of a space and a word.
    """
    asked, field, rest = cut(template)
    before, answer = asked.format_map(row), f"{row[field]}{rest.format_map(row)}"
    kept = before.rstrip(" ")
    return kept, before[len(kept) :] + answer


def with_prompt(template: str, prompt: str) -> dict[str, str]:
    """The fields before the answer, where a prompt stands in the first one, and nothing in the others."""
    names = asked_fields(template)
    return {name: prompt if name == names[0] else "" for name in names}


def asked_fields(template: str) -> tuple[str, ...]:
    """The fields before the answer."""
    return TaskSpec(template=cut(template)[0]).fields


def asked_of(template: str, row: Mapping[str, Any]) -> str:
    """What is asked, without spaces at its end."""
    return cut(template)[0].format_map(row).rstrip(" ")


def cut(template: str) -> tuple[str, str, str]:
    """The template before its last field, that field, and the template after it."""
    field = [name for _, name, _, _ in string.Formatter().parse(template) if name][-1]
    before, _, after = template.rpartition(f"{{{field}}}")
    return before, field, after


def filled_up(rows: Sequence[Sequence[int]], length: int, value: int) -> torch.Tensor:
    """The rows with this value after them."""
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])


def _latter_half(ids: tuple[int, ...]) -> tuple[int, ...]:
    half = max(1, len(ids) // 2)
    return (*[IGNORED] * half, *ids[half:])


def _tokens_of(targets_BT: torch.Tensor) -> torch.Tensor:
    return (targets_BT != IGNORED).sum(dim=1)


def _nats_per_token(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    return token_nats(logits_BTV, targets_BT) / _tokens_of(targets_BT)
