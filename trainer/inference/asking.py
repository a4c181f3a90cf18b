"""What a task asks of a model, from rows that have no answer yet."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from configs.errors import InputError
from configs.schema.data import RecordSettings
from configs.schema.tasks import TaskSpec
from trainer.data.reading.counts import ReadCounts
from trainer.inference.decoding import Decoding
from trainer.inference.generation import write
from trainer.tasks.fields import Answers, Words
from trainer.tasks.task import AnsweringTask, Encoded, Opening, Prediction, Row, by_length, kind_of

_BATCH = 16
_SPOKEN = {"role": "assistant", "content": "."}
_UNKNOWN: dict[str, dict[str, Callable[[Mapping[str, Any]], Any]]] = {
    "classification": {"label": lambda _: 0},
    "multilabel": {"labels": lambda _: ()},
    "entities": {"tags": lambda row: (0,) * len(row["tokens"])},
    "qa": {"answer": lambda row: _first_letter(row["context"])},
}
"""What stands in place of each task's answer: no prediction depends on it."""


class Asking:
    """A finished model's answers to rows.

    Args:
        model: that answers.
        tokenizer: the model's.
        task: what it was trained for.
        spec: the same, by its settings.
        data: which columns the rows have.
        max_new_tokens: most tokens of an answer that is text; it is what the model holds likeliest, token by token.

    Raises:
        InputError: a column is named for a field that the task hasn't got.
    """

    def __init__(
        self, model: Any, tokenizer: Any, task: Any, spec: TaskSpec, data: RecordSettings, max_new_tokens: int
    ) -> None:
        self._model, self._tokenizer, self._task, self._spec = model, tokenizer, task, spec
        self._max_new_tokens = max_new_tokens
        kinds = kind_of(spec.name).fields(spec)
        self._unknown = _UNKNOWN.get(spec.name) or _last_field(spec, kinds)
        self._kinds = {field: kind for field, kind in kinds.items() if field not in self._unknown}
        self._columns = {field: data.column(field) for field in self._kinds}
        self._words, self._counts = Words(spec.labels, {}), ReadCounts()
        if strange := set(data.columns) - set(kinds):
            raise InputError(
                f"columns.{min(strange)}: the task {spec.name!r} has no such field; it has {', '.join(kinds)}"
            )

    @property
    def columns(self) -> list[str]:
        """Columns that every row must have."""
        return list(self._columns.values())

    def example(self, row: Mapping[str, Any], where: str) -> Encoded:
        """A row as the model reads it.

        Raises:
            InputError: a column is missing, empty or of another kind, or nothing fits the model.
        """
        fields = {}
        for field, kind in self._kinds.items():
            column = self._columns[field]
            if column not in row:
                raise InputError(f"{where}: no column {column!r}")
            fields[field] = kind(_open_ended(field, row[column]), column, where, self._words, self._counts)
        if None in fields.values():
            raise InputError(f"{where}: a column that the task reads is empty")
        whole = {**fields, **{field: unknown(fields) for field, unknown in self._unknown.items()}}
        return self._encoded(whole, where)

    def _encoded(self, row: Row, where: str) -> Encoded:
        if self._spec.name == "causal":
            ids = self._task.opening(row["text"]).ids
            found = [Encoded(ids, len(row["text"]), truncated=False)] if len(ids) < self._task.context_length else []
        else:
            found = list(self._task.scored([row]))
        if not found:
            raise InputError(f"{where}: nothing that the model can answer, or longer than its context")
        return found[0]

    def answers(self, examples: Sequence[Encoded]) -> list[Prediction]:
        """The model's answers, in the examples' order; those of like length are asked together."""
        place = {id(example): number for number, example in enumerate(examples)}
        found: list[Prediction] = [Prediction("")] * len(examples)
        for batch in by_length(examples, _BATCH):
            for example, answer in zip(batch, self._together(batch), strict=True):
                found[place[id(example)]] = answer
        return found

    def _together(self, batch: list[Encoded]) -> list[Prediction]:
        with torch.no_grad():
            if isinstance(self._task, AnsweringTask):
                return self._task.predictions(self._model, batch, self._max_new_tokens)
            return [Prediction(self._continued(example)) for example in batch]

    def _continued(self, example: Encoded) -> str:
        opening = Opening(example.ids, continued=True, ends=(self._tokenizer.eos_token_id,))
        decoding = Decoding(self._max_new_tokens)
        return write(self._model, self._tokenizer, opening, self._task.context_length, decoding)


def with_columns(data: RecordSettings, named: Sequence[str]) -> RecordSettings:
    """The same settings with other names of columns.

    Raises:
        InputError: a text is no ``FIELD=COLUMN``.
    """
    found, text = dict(data.columns), data.text
    for one in named:
        field, _, column = one.partition("=")
        if not field or not column:
            raise InputError(f"--column {one!r}: give FIELD=COLUMN, the task's field and the file's name for it")
        if field == "text":
            text = column
        else:
            found[field] = column
    return data.model_copy(update={"columns": found, "text": text})


def _last_field(spec: TaskSpec, kinds: Mapping[str, Any]) -> dict[str, Callable[[Mapping[str, Any]], Any]]:
    """Of a template it is the answer; of a text or a dialogue nothing is."""
    return {} if list(kinds) in (["text"], ["messages"]) and spec.name in {"causal", "chat"} else {[*kinds][-1]: _empty}


def _first_letter(context: str) -> Answers:
    bare = context.lstrip()
    return Answers((bare[0],), (len(context) - len(bare),))


def _empty(_row: Mapping[str, Any]) -> str:
    return ""


def _open_ended(field: str, value: Any) -> Any:
    """A dialogue that ends with a person's turn gets one more, which stands for the answer."""
    last = value[-1] if field == "messages" and isinstance(value, list) and value else None
    # Compared with a tuple: a bad file's role may be a list.
    if isinstance(last, dict) and last.get("role", last.get("from")) not in (
        "assistant",
        "gpt",
    ):
        return [*value, _SPOKEN]
    return value
