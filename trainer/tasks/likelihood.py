"""Which label a text has, in the model's own words: the one that a decoder holds likeliest after the text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from configs.errors import InputError
from configs.printing import printable
from configs.schema.tasks import TaskSpec, template_fields
from trainer.metrics.measures import Measures
from trainer.tasks.classification import ClassificationTask, likeliest, scores_of
from trainer.tasks.marked import Mark, Marked
from trainer.tasks.task import IGNORED, Encoded, Prediction, Row
from trainer.tasks.text import token_nats
from trainer.tasks.written import WrittenAnswerTask, cut


@dataclass(frozen=True)
class Choice(Encoded):
    """A text that each of the labels may follow; the target is the number of the right one.

    Attributes:
        endings: what follows the tokens, label by label, from the first token on in which labels differ.
    """

    endings: tuple[tuple[int, ...], ...] = ()

    def ended(self, label: int) -> Encoded:
        """The text with one of the labels, of which what tells it from others is to be answered."""
        ending = self.endings[label]
        target = (*[IGNORED] * len(self.ids), *ending)
        return Encoded((*self.ids, *ending), self.characters, self.truncated, target)


class LikelihoodTask(WrittenAnswerTask):
    """One label for a text, without a head. It is learnt as an answer is that is written.

    A text too long is cut before the template's last words: the label always has room, the same whichever it is.
    """

    name = ClassificationTask.name
    default_template = "{text}\n\n{label}"

    def __init__(self, tokenizer: Any, context_length: int, spec: TaskSpec) -> None:
        template = spec.template or self.default_template
        if "label" not in template_fields(template):
            template = f"{template.rstrip(' ')} {{label}}"
        super().__init__(tokenizer, context_length, spec.model_copy(update={"template": template}))
        asked, _, after = cut(template)
        kept = asked.rstrip(" ")
        self._labels = spec.labels
        self._answers = [f"{asked[len(kept) :]}{label}{after.format_map({})}" for label in spec.labels]
        before, field, tail = cut(kept)
        self._before, self._tail = f"{before}{{{field}}}", tail.format_map({})
        self._room = context_length - self._longest()

    @staticmethod
    def measured(spec: TaskSpec, context_length: int) -> Measures:
        """As with a head; the loss is over the labels, not over all that the model could say."""
        return ClassificationTask.measured(spec, context_length)

    def _longest(self) -> int:
        """Most tokens of a label and its end.

        Raises:
            InputError: beside a label nothing fits the context, or its tokens tell nothing.
        """
        alone = [self._with_answer(self._tail, answer) for answer in self._answers]
        seen = dict[tuple[int, ...], str]()
        for label, found in zip(self._labels, alone, strict=True):
            other, shown = seen.setdefault(tuple(found.ids), label), repr(printable(label)[:100])
            if len(found.ids) >= self.context_length:
                raise InputError(
                    f"labels: {shown} takes {len(found.ids)} tokens with the template's last words, and the model's "
                    f"context has {self.context_length}; give a shorter one, or a longer context"
                )
            if other != label:
                raise InputError(
                    f"labels: {shown} and {printable(other)[:100]!r} are the same tokens to the model; give others"
                )
            if _learnt(found) < 2:  # its end alone: the tokenizer has no sign for it, or doesn't say where one stands
                raise InputError(f"labels: {shown} is no token that the model knows; give another label or model")
        return max(map(_learnt, alone))

    def with_shots(self, rows: Sequence[Row]) -> Self:
        """The same task, with these worked examples before each prompt."""
        return super().with_shots([{**row, "label": self._labels[row["label"]]} for row in rows])

    def _with_answer(self, asked: str, answer: str) -> Marked:
        return self._tokens([(asked, Mark.READ), (answer, Mark.LEARNT)], ended=True)

    def _encoded(self, row: Row) -> Encoded | None:
        asked, short = self._asked(row)
        found = self._with_answer(asked, self._answers[row["label"]]).example(self.context_length)
        return found and Encoded(found.ids, len(asked), short or found.truncated, found.target, found.words)

    def scored(self, rows: Sequence[Row]) -> tuple[Encoded, ...]:
        """One for each row."""
        return tuple(self._choice(row) for row in rows)

    def _choice(self, row: Row) -> Choice:
        asked, short = self._asked(row)
        found = [self._with_answer(asked, answer).ids[: self.context_length] for answer in self._answers]
        shared = _shared(found)
        endings = tuple(tuple(ids[shared:]) for ids in found)
        return Choice(tuple(found[0][:shared]), len(asked), short, (row["label"],), endings=endings)

    def _asked(self, row: Row) -> tuple[str, bool]:
        """What stands before the label, and whether it had to be cut."""
        text = whole = self._before.format_map(row)
        while True:
            asked = f"{self._shown}{text}{self._tail}".rstrip(" ")
            found = self._backend.encode(asked, add_special_tokens=False)
            over = 1 + len(found.ids) - self._room
            if over <= 0 or not text:
                return asked, text != whole
            # By characters: what is left becomes tokens again, as a text that was never longer.
            starts = [first - len(self._shown) for first, _ in found.offsets]
            inside = [start for start in starts if 0 <= start < len(text)]
            text = text[: min(inside[-over:][0], len(text) - 1) if inside else 0]

    def label_nats(self, model: Any, examples: Sequence[Any]) -> torch.Tensor:
        """Negative log-likelihood of each label after each text, from where labels differ, shape (B, L)."""
        nats = []
        for label in range(len(self._labels)):  # one at a time: a batch is as large as it was given
            batch = self.collate([example.ended(label) for example in examples])
            nats.append(token_nats(self.logits(model, batch), batch["targets"]))
        return torch.stack(nats, dim=1)

    def predictions(self, model: Any, examples: Sequence[Any], _max_new_tokens: int) -> list[Prediction]:
        """The label that is likeliest after each text, with the probability of each label among them all."""
        logits_BL = -self.label_nats(model, examples)
        found = zip(likeliest(logits_BL), logits_BL.double().softmax(dim=1).tolist(), strict=True)
        return [Prediction(self._labels[int(chosen_L.int().argmax())], tuple(values)) for chosen_L, values in found]

    def references(self, examples: Sequence[Any]) -> list[Any]:
        """The texts' own labels."""
        return [self._labels[example.target[0]] for example in examples]

    def record_scores(self, model: Any, examples: Sequence[Encoded]) -> torch.Tensor:
        """For each text: right or not, nats, one; then the counts of each label. Shape (B, 3 + 3 L), float64."""
        logits_BL = -self.label_nats(model, examples)
        targets_B = torch.tensor([example.target[0] for example in examples])
        truths_BL = torch.nn.functional.one_hot(targets_B, len(self._labels)).bool()
        nats_B = torch.nn.functional.cross_entropy(logits_BL, targets_B, reduction="none")
        return scores_of(likeliest(logits_BL), truths_BL, nats_B)


def _learnt(found: Marked) -> int:
    return found.marks.count(Mark.LEARNT)


def _shared(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with; the last one of a row, its end, is never among them."""
    most = min(map(len, rows)) - 1
    return next((place for place in range(most) if len({row[place] for row in rows}) > 1), most)
