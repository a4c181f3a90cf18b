"""Questions that a text answers: where in it the answer begins and ends, by a head on every token."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any
from unicodedata import category

import torch
from torch.nn import functional

from configs.errors import InputError
from configs.schema.tasks import TaskSpec
from trainer.metrics.measures import Measures, Ratio
from trainer.metrics.question_answering import exact_match, token_f1
from trainer.tasks import fields
from trainer.tasks.headed import HeadedTask
from trainer.tasks.task import Encoded, Prediction, Row

_LONGEST_ANSWER = 30  # tokens, as is usual
_OVERLAP = 3  # a window shares this part of its context with the next one, 1 / 3 of it
_AT_ONCE = 16  # windows of one record


@dataclass(frozen=True)
class Window(Encoded):
    """A question and a part of its context. The target is the first and the last token of the answer.

    Attributes:
        first: place of the context's first token.
        spans: which characters of the context each of its tokens stands for.
        types: of all tokens, as a model has them that tells question and context apart.
    """

    first: int = 0
    spans: tuple[tuple[int, int], ...] = ()
    types: tuple[int, ...] = ()

    @property
    def candidates(self) -> list[int]:
        """1 for each token where an answer may begin or end: the first one, which means none, and the context's."""
        return [int(place == 0 or 0 <= place - self.first < len(self.spans)) for place in range(len(self.ids))]


@dataclass(frozen=True)
class Question(Encoded):
    """All windows of a question, which are answered together.

    Attributes:
        windows: in order; the tokens are those of the first one.
        context: what the answer is a part of.
        answers: the right ones.
    """

    windows: tuple[Window, ...] = ()
    context: str = ""
    answers: tuple[str, ...] = ()


class AnswersTask(HeadedTask):
    """Extractive question answering. A long context makes several windows, of which each is an example."""

    name = "qa"
    least = 5

    def __init__(self, tokenizer: Any, context_length: int, spec: TaskSpec) -> None:
        super().__init__(tokenizer, context_length, spec)
        self.measures = self.measured(spec, context_length)

    @staticmethod
    def fields(_spec: TaskSpec) -> dict[str, fields.Kind]:
        """The context, the question, and the answer with its place where that is known."""
        return {"context": fields.full_text, "question": fields.full_text, "answer": fields.answers}

    @staticmethod
    def misfit(row: Row) -> str:
        """Answers are parts of their context, and stand where they are said to."""
        for text, start in zip(*row["answer"], strict=True):
            if text not in row["context"]:
                return "its answer is not in its context; give one that is, letter by letter"
            if start >= 0 and not row["context"].startswith(text, start):
                return "its answer does not begin at answer_start; count in characters from 0, leave the start out"
        return ""

    @staticmethod
    def measured(_spec: TaskSpec, _context_length: int) -> Measures:
        """Token F1 and exact match, each from 0 to 1."""
        ratios = {name: Ratio({name: 1.0}, {"questions": 1.0}) for name in ("answer_f1", "exact_match")}
        return Measures({"answer_f1": 1.0, "exact_match": 1.0, "questions": 1.0}, ratios)

    @cached_property
    def _room(self) -> int:
        """Tokens for question and context together."""
        if not any(end for _, end in self.backend.encode("two words").offsets):
            raise InputError(
                "tokenizer: it doesn't say which characters a token stands for, which the task 'qa' needs; give a "
                "tokenizer that does"
            )
        return self.context_length - int(self.backend.num_special_tokens_to_add(True))

    def examples(self, rows: Sequence[Row]) -> tuple[Encoded, ...]:
        """The windows of all rows."""
        return tuple(chain.from_iterable(self._windows(row) for row in rows))

    def scored(self, rows: Sequence[Row]) -> tuple[Encoded, ...]:
        """The questions: an answer is chosen among all windows of one."""
        return tuple(self._question(row) for row in rows)

    def _question(self, row: Row) -> Question:
        windows, (texts, _) = self._windows(row), row["answer"]
        size, cut = len(row["context"]), windows[0].truncated
        return Question(windows[0].ids, size, cut, windows=windows, context=row["context"], answers=texts)

    def _windows(self, row: Row) -> tuple[Window, ...]:
        context, question = row["context"], row["question"]
        asked, tokens = self._asked(question)
        place = _place(context, *(values[0] for values in row["answer"]))
        self.backend.enable_truncation(
            self.context_length, stride=(self._room - tokens) // _OVERLAP, strategy="only_second"
        )
        found = self.backend.encode(asked, context)
        return tuple(self._window(part, context, place, cut=asked != question) for part in (found, *found.overflowing))

    def _asked(self, question: str) -> tuple[str, int]:
        """The question, or as much of it as leaves half of the room to the context; and its number of tokens."""
        self.backend.no_truncation()
        most = self._room // 2
        while True:
            found = self.backend.encode(question, add_special_tokens=False)
            if len(found.ids) <= most:
                return question, len(found.ids)
            question = question[: min(found.offsets[most][0], len(question) - 1)]

    def _window(self, part: Any, context: str, place: tuple[int, int], *, cut: bool) -> Window:
        of_context = [index for index, which in enumerate(part.sequence_ids) if which == 1]
        first, spans = (of_context or [0])[0], tuple(_bare(context, *part.offsets[index]) for index in of_context)
        ids, types = tuple(part.ids) or (self.pad,), tuple(part.type_ids) or (0,)
        return Window(ids, len(spans), cut, _target(first, spans, place), first=first, spans=spans, types=types)

    def with_target(self, ids: tuple[int, ...], number: int) -> Encoded:
        """A made-up window, whose context is the second half of it."""
        first = len(ids) // 2
        spans = tuple((place, place + 1) for place in range(len(ids) - first))
        start = number % len(spans)
        target, types = (first + start, len(ids) - 1), tuple(int(place >= first) for place in range(len(ids)))
        return Window(ids, len(spans), truncated=False, target=target, first=first, spans=spans, types=types)

    def collate(self, examples: Sequence[Any]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask``, ``token_type_ids``, ``candidates`` (B, T), ``targets`` (B, 2)."""
        return {
            **self.inputs(examples),
            "token_type_ids": self.filled(examples, [one.types for one in examples], 0),
            "candidates": self.filled(examples, [one.candidates for one in examples], 0),
            "targets": torch.tensor([one.target for one in examples]),
        }

    def record_losses(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean nats of each window's start and end, shape (B,)."""
        nats_B = [
            functional.cross_entropy(logits_BT, targets_B, reduction="none")
            for logits_BT, targets_B in zip(_ends(model, batch), batch["targets"].unbind(dim=1), strict=True)
        ]
        return (nats_B[0] + nats_B[1]) / 2

    def record_scores(self, model: Any, examples: Sequence[Any]) -> torch.Tensor:
        """For each question: token F1, exact match, one, by the rules of its language. Shape (B, 3), float64."""
        found = [(self.answer(model, one), one.answers, self._spec.language) for one in examples]
        scores = [(token_f1(*answer), exact_match(*answer), 1.0) for answer in found]
        return torch.tensor(scores, dtype=torch.float64)

    def predictions(self, model: Any, examples: Sequence[Any], _max_new_tokens: int) -> list[Prediction]:
        """The likeliest part of each context."""
        return [Prediction(self.answer(model, one)) for one in examples]

    def references(self, examples: Sequence[Any]) -> list[Any]:
        """All that are right, of each question."""
        return [one.answers for one in examples]

    def answer(self, model: Any, question: Question) -> str:
        """The part of the context that is likeliest to be the answer, over all windows; of several the first."""
        best, answer = -torch.inf, ""
        for start in range(0, len(question.windows), _AT_ONCE):
            windows = question.windows[start : start + _AT_ONCE]
            ends = [functional.log_softmax(logits_BT, dim=1) for logits_BT in _ends(model, self.collate(windows))]
            for row, window in enumerate(windows):
                inside = slice(window.first, window.first + len(window.spans))
                likelihood, span = _likeliest(ends[0][row, inside], ends[1][row, inside])
                if likelihood > best:
                    best, answer = likelihood, question.context[window.spans[span[0]][0] : window.spans[span[1]][1]]
        return answer


def tells_parts_apart(model: Any) -> bool:
    """Whether a model is told which tokens are the question's and which the context's."""
    return (getattr(model.config, "type_vocab_size", None) or 0) > 1


def _ends(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of an answer's first and last token, each (B, T), where there may be one."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if tells_parts_apart(model):
        inputs["token_type_ids"] = batch["token_type_ids"]
    bare = getattr(model, "get_base_model", lambda: model)()  # with its adapter: peft's own class drops the types
    found, elsewhere = bare(**inputs), batch["candidates"] == 0
    start_BT, end_BT = (
        logits_BT.float().masked_fill(elsewhere, -torch.inf) for logits_BT in (found.start_logits, found.end_logits)
    )
    return start_BT, end_BT


def _likeliest(start_C: torch.Tensor, end_C: torch.Tensor) -> tuple[float, tuple[int, int]]:
    """The best first and last token; minus infinity where there is none."""
    if not len(start_C):
        return -torch.inf, (0, 0)
    both_CC = torch.nan_to_num(start_C[:, None] + end_C[None, :], nan=-torch.inf)
    allowed_CC = torch.ones_like(both_CC, dtype=torch.bool).triu().tril(_LONGEST_ANSWER - 1)
    both_CC = both_CC.masked_fill(~allowed_CC, -torch.inf)
    place = int(both_CC.argmax())
    return float(both_CC.flatten()[place]), (place // len(start_C), place % len(start_C))


def _place(context: str, text: str, start: int) -> tuple[int, int]:
    """Where an answer stands, blanks around it aside: there where it is said to, or else in the first place."""
    start = context.index(text) if start < 0 else start
    before = len(text) - len(text.lstrip())
    return start + before, start + before + len(text.strip())


def _bare(context: str, start: int, end: int) -> tuple[int, int]:
    """A token's characters without the blank that some tokenizers count to the word after it.

    With the marks that belong to the last one: BERT's tokenizer drops vowel signs and accents, and no answer should.
    """
    bare = end - len(context[start:end].lstrip())
    while end < len(context) and category(context[end]).startswith("M"):
        end += 1
    return bare, end


def _target(first: int, spans: Sequence[tuple[int, int]], place: tuple[int, int]) -> tuple[int, int]:
    """The first and last token of an answer that lies inside a window whole; else the window's first token."""
    start, end = place
    if not spans or start < spans[0][0] or end > spans[-1][1]:
        return 0, 0
    inside = [index for index, (begins, ends) in enumerate(spans) if ends > start and begins < end]
    return (first + inside[0], first + inside[-1]) if inside else (0, 0)
