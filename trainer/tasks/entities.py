"""Named entities: a tag for each word of a text (BIO), by a head on every token."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch

from configs.errors import InputError
from configs.schema.tasks import TaskSpec
from trainer.metrics.measures import COUNTS, Measures, Ratio
from trainer.tasks import fields
from trainer.tasks.headed import HeadedTask, logits_of
from trainer.tasks.task import IGNORED, Encoded, Prediction, Row

# Public caps of what one example adds to a private evaluation; beyond them nothing is refused, but shortened.
_MOST_WORDS = 64
_MOST_ENTITIES = 4.0  # 2-norm of all its counts

Entity = tuple[str, int, int]
"""Type, first word, and the one after the last."""


class EntitiesTask(HeadedTask):
    """Tags of words. The first piece of a word carries its tag; what lies beyond the context is cut."""

    name = "entities"

    def __init__(self, tokenizer: Any, context_length: int, spec: TaskSpec) -> None:
        super().__init__(tokenizer, context_length, spec)
        self.measures = self.measured(spec, context_length)

    @staticmethod
    def fields(_spec: TaskSpec) -> dict[str, fields.Kind]:
        """The words, and their tags."""
        return {"tokens": fields.words, "tags": fields.tags}

    @staticmethod
    def misfit(row: Row) -> str:
        """Words and tags are as many."""
        return "" if len(row["tokens"]) == len(row["tags"]) else "it has not as many tags as words; give each word one"

    @staticmethod
    def measured(spec: TaskSpec, context_length: int) -> Measures:
        """F1 of whole entities, and how many words have the right tag; three counts for each type of entity."""
        most = float(min(_MOST_WORDS, context_length))
        found, extra, missed = COUNTS
        ratios = {
            "entity_f1": Ratio({found: 2.0}, {found: 2.0, extra: 1.0, missed: 1.0}),
            "accuracy": Ratio({"correct words": 1.0}, {"words": 1.0}),
        }
        return Measures({"correct words": most, "words": most}, ratios, types_of(spec.labels), _MOST_ENTITIES)

    @cached_property
    def _whole_words(self) -> Any:
        """What turns a text into tokens, and says where each stands."""
        if not any(end for _, end in self.backend.encode("two words").offsets):
            raise InputError(
                "tokenizer: it doesn't say which characters a token stands for, which the task 'entities' needs; give "
                "a tokenizer that does"
            )
        return self.backend

    def examples(self, rows: Sequence[Row]) -> tuple[Encoded, ...]:
        """One for each row; none for a row of which the tokenizer sees no word."""
        found = (self._encoded(row["tokens"], row["tags"]) for row in rows)
        return tuple(example for example in found if any(tag != IGNORED for tag in example.target))

    scored = examples

    def _encoded(self, words: Sequence[str], tags: Sequence[int]) -> Encoded:
        text, starts = " ".join(words), [0]
        for word in words:
            starts.append(starts[-1] + len(word) + 1)
        found = self._whole_words.encode(text)
        targets, seen = [IGNORED] * len(found.ids), set[int]()
        for place, (start, end) in enumerate(found.offsets):
            # By its last character: a piece may begin with the blank before its word.
            number = bisect_right(starts, end - 1) - 1
            if start < end <= starts[number] + len(words[number]) and number not in seen:
                targets[place] = tags[number]
                seen.add(number)
        return Encoded(tuple(found.ids), len(text), bool(found.overflowing), tuple(targets))

    def with_target(self, ids: tuple[int, ...], number: int) -> Encoded:
        """A made-up example, in which every other token begins a word."""
        tags = len(self._spec.labels)
        target = [(number + place) % tags if place % 2 == 0 else IGNORED for place in range(len(ids))]
        return Encoded(ids, len(ids), truncated=False, target=tuple(target))

    def collate(self, examples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask`` and ``targets``, all (B, T), padded on the right."""
        targets = self.filled(examples, [example.target for example in examples], IGNORED)
        return {**self.inputs(examples), "targets": targets}

    def record_losses(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean nats of each example's words, shape (B,)."""
        logits_BTL, targets_BT = logits_of(model, batch), batch["targets"]
        nats_N = torch.nn.functional.cross_entropy(
            logits_BTL.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return nats_N.view_as(targets_BT).sum(dim=1) / (targets_BT != IGNORED).sum(dim=1)

    def record_scores(self, model: Any, examples: Sequence[Encoded]) -> torch.Tensor:
        """For each example: right words, words; then the counts of each type. Shape (B, 2 + 3 K), float64."""
        return torch.tensor([self._scores(pairs) for pairs in self._tags(model, examples)], dtype=torch.float64)

    def predictions(self, model: Any, examples: Sequence[Encoded], _max_new_tokens: int) -> list[Prediction]:
        """The tags of the words that the model has read."""
        return [Prediction(tuple(mine for mine, _ in pairs)) for pairs in self._tags(model, examples)]

    def references(self, examples: Sequence[Encoded]) -> list[Any]:
        """The right tags of the same words. Where a tokenizer sees nothing of an entity's first word, it is none."""
        return [
            _of_whole_entities([self._spec.labels[tag] for tag in one.target if tag != IGNORED]) for one in examples
        ]

    def _tags(self, model: Any, examples: Sequence[Encoded]) -> Iterator[list[tuple[str, str]]]:
        """Of each word that the model has read: its answer, and the right one."""
        logits_BTL, labels = logits_of(model, self.collate(examples)), self._spec.labels
        answers_BT = torch.nan_to_num(logits_BTL, nan=-torch.inf).argmax(dim=2).tolist()
        for answer, one in zip(answers_BT, examples, strict=True):
            # The answer goes on over the tokens that fill up.
            found = zip(answer, one.target, strict=False)
            yield [(labels[mine], labels[truth]) for mine, truth in found if truth != IGNORED]

    def _scores(self, pairs: Sequence[tuple[str, str]]) -> list[int]:
        mine, truth = ({*entities([pair[side] for pair in pairs])} for side in (0, 1))
        counts = [
            sum(entity[0] == kind for entity in found)
            for found in (mine & truth, mine - truth, truth - mine)
            for kind in self.measures.labels
        ]
        return [sum(one == other for one, other in pairs), len(pairs), *counts]


def types_of(tags: Sequence[str]) -> tuple[str, ...]:
    """The types of entities that tags tell apart."""
    return tuple(tag[2:] for tag in tags if tag.startswith("B-"))


def entities(tags: Sequence[str]) -> Iterator[Entity]:
    """The whole entities: a B- and every I- of its type right after it. Another I- is part of none."""
    start, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        if kind and tag != f"I-{kind}":
            yield kind, start, place
            kind = ""
        if tag.startswith("B-"):
            start, kind = place, tag[2:]


def _of_whole_entities(tags: Sequence[str]) -> tuple[str, ...]:
    """The tags, without those that belong to no entity."""
    kept = ["O"] * len(tags)
    for _, start, end in entities(tags):
        kept[start:end] = tags[start:end]
    return tuple(kept)
