"""A record's fields: from a source's columns and words to the task's, or a refusal that names the place."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple
from unicodedata import normalize

from configs.errors import InputError
from configs.printing import printable
from configs.schema.data import RecordSettings
from configs.schema.tasks import TaskSpec
from trainer.data.reading.counts import ReadCounts, mended
from trainer.data.reading.rows import Row, said
from trainer.tasks.task import kind_of

_SHOWN = 40  # characters of a word that should be a label; a longer one is likely a record's text


@dataclass(frozen=True)
class Words:
    """Which of a silo's words are which of the federation's labels.

    Attributes:
        labels: the federation's, in order.
        renamed: labels by the silo's words.
    """

    labels: tuple[str, ...]
    renamed: Mapping[str, str]

    def index(self, word: str, column: str, where: str) -> int:
        """The number of the label that a word stands for.

        Raises:
            InputError: for none. The word is named, to the steward who starts the silo.
        """
        label = self.renamed.get(word, normalize("NFC", word))
        if label in self.labels:
            return self.labels.index(label)
        shown = repr(printable(word)) if len(word) <= _SHOWN else f"a text of {len(word)} characters"
        raise InputError(
            f"{where}: column {column!r} holds {shown}, which is none of the {len(self.labels)} labels; map it under "
            "labels of the data, or take the record out"
        )


Kind = Callable[[Any, str, str, Words, ReadCounts], Any]
"""Reads one value: (value, column, where, words, counts); None where the record has none."""


def text(value: Any, column: str, where: str, _words: Words, counts: ReadCounts) -> str | None:
    """A text that is not blank, with what was lost in it replaced and counted."""
    return said(value, column, where, counts)


def label(value: Any, column: str, where: str, words: Words, _counts: ReadCounts) -> int:
    """The number of a label."""
    return words.index(_word(value, column, where), column, where)


def label_set(value: Any, column: str, where: str, words: Words, _counts: ReadCounts) -> tuple[int, ...]:
    """The numbers of labels, ascending: of a list, or of a text with commas between them. None at all are none."""
    if value is None:
        return ()
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        parts = [parts]
    named = [_word(part, column, where).strip() for part in parts]
    return tuple(sorted({words.index(word, column, where) for word in named if word}))


def words(value: Any, column: str, where: str, _words: Words, counts: ReadCounts) -> tuple[str, ...] | None:
    """The words of a text: of a list, or of a text with blanks between them. None at all are no record."""
    found = _listed(value, column, where)
    if not all(isinstance(part, str) for part in found):
        raise InputError(f"{where}: column {column!r} holds a list in which not all are texts; give a list of words")
    return tuple(mended(part, counts) for part in found) or None


def tags(value: Any, column: str, where: str, words: Words, _counts: ReadCounts) -> tuple[int, ...]:
    """The numbers of labels, one for each word: of a list, or of a text with blanks between them."""
    found = tuple(words.index(_word(part, column, where), column, where) for part in _listed(value, column, where))
    for before, tag in pairwise(["O", *(words.labels[number] for number in found)]):
        if tag.startswith("I-") and before[2:] != tag[2:]:
            raise InputError(f"{where}: column {column!r} has an I- that continues no entity; begin each with its B-")
    return found


def _listed(value: Any, column: str, where: str) -> Sequence[Any]:
    if value is None:
        return ()
    if isinstance(value, str):
        return value.split()
    if isinstance(value, list | tuple):
        return value
    raise InputError(
        f"{where}: column {column!r} holds a value of the type {type(value).__name__}; give a list, or a text with "
        "blanks between the words"
    )


def full_text(value: Any, column: str, where: str, words: Words, counts: ReadCounts) -> str:
    """A text that has to be there."""
    found = text(value, column, where, words, counts)
    if found is None:
        raise InputError(f"{where}: column {column!r} is empty; give a text, or take the record out")
    return found


class Answers(NamedTuple):
    """The answers that are right.

    Attributes:
        texts: of the answers, the one that is learnt first.
        starts: where each begins in its context, in characters; -1 where that isn't known.
    """

    texts: tuple[str, ...]
    starts: tuple[int, ...]

    def treated(self, treat: Callable[[str], str]) -> "Answers":
        """The same with other texts, of which nobody knows where they are."""
        return Answers(tuple(map(treat, self.texts)), (-1,) * len(self.texts))


def answers(value: Any, column: str, where: str, _words: Words, counts: ReadCounts) -> Answers:
    """A text, or SQuAD's answers: an object of lists, as in Hugging Face datasets, or a list of objects."""
    texts, starts = _texts_and_starts(value)
    whole = all(isinstance(start, int) for start in starts) and len(starts) == len(texts) > 0
    if not whole or not all(isinstance(one, str) and one.strip() for one in texts):
        raise InputError(
            f"{where}: column {column!r} holds no answer, or one without its place; give a text, or "
            '{"text": [...], "answer_start": [...]}, or take the record out'
        )
    return Answers(tuple(mended(one, counts) for one in texts), tuple(starts))


def _texts_and_starts(value: Any) -> tuple[list[Any], list[Any]]:
    if isinstance(value, dict):
        texts, starts = (_several(value.get(key)) for key in ("text", "answer_start"))
        return texts, starts or [-1] * len(texts)
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        return [part.get("text") for part in value], [part.get("answer_start", part.get("start", -1)) for part in value]
    return [value], [-1]


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value is not None else []


def with_texts(row: Mapping[str, Any], treat: Callable[[str], str]) -> dict[str, Any]:
    """A record's fields with other texts in place of its own."""
    return {name: _treated(value, treat) for name, value in row.items()}


def _treated(value: Any, treat: Callable[[str], str]) -> Any:
    if isinstance(value, Answers):
        return value.treated(treat)
    if isinstance(value, tuple):  # a dialogue's messages, for instance
        return tuple(_treated(part, treat) for part in value)
    return treat(value) if isinstance(value, str) else value


def _word(value: Any, column: str, where: str) -> str:
    """A label as text: files hold numbers and truth values, too."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str | int):
        return str(value).strip()
    found = "nothing" if value is None else f"a value of the type {type(value).__name__}"
    raise InputError(f"{where}: the label column {column!r} holds {found}; give a label, or take the record out")


class FieldReader:
    """Reads the rows of a source as records of a task.

    Args:
        data: which columns and words the source has.
        spec: the task.
    """

    def __init__(self, data: RecordSettings, spec: TaskSpec) -> None:
        self._task = kind_of(spec.name)
        self._kinds = self._task.fields(spec)
        self._words = Words(spec.labels, self._checked(data, spec))
        self._columns = {field: data.column(field) for field in self._kinds}

    def _checked(self, data: RecordSettings, spec: TaskSpec) -> dict[str, str]:
        """What the source renames has to be there: a misspelt name would rename nothing."""
        for field in data.columns:
            if field not in self._kinds:
                raise InputError(
                    f"columns.{field}: the task {spec.name!r} has no such field; it has {', '.join(self._kinds)}"
                )
        renamed = {word: normalize("NFC", name) for word, name in data.labels.items()}
        for word, name in renamed.items():
            if name not in spec.labels:
                raise InputError(
                    f"labels: {printable(word)!r} is mapped to {printable(name)!r}, which is no label of the task; "
                    f"it has {printable(', '.join(spec.labels) or 'none')[:500]}"
                )
        return renamed

    @property
    def columns(self) -> list[str]:
        """Columns that the source must have."""
        return list(dict.fromkeys(self._columns.values()))

    def read(self, row: Row, where: str, counts: ReadCounts) -> dict[str, Any] | None:
        """A row's fields; None where one of them is empty.

        Raises:
            InputError: a value is of another kind, a word no label, or the fields don't fit together.
        """
        values = {
            field: kind(row[column], column, where, self._words, counts)
            for (field, kind), column in zip(self._kinds.items(), self._columns.values(), strict=True)
        }
        if None in values.values():
            return None
        if misfit := self._task.misfit(values):
            raise InputError(f"{where}: {misfit}, or take the record out")
        return values
