"""What records are drawn for: fields that are given, and the one that the model writes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from configs.errors import InputError
from configs.schema.data import RecordSettings
from configs.schema.tasks import WRITES, TaskSpec
from trainer.data.reading.counts import ReadCounts, mended
from trainer.tasks.chat import ASSISTANT, ROLES, USER
from trainer.tasks.task import Opening, WritingTask, kind_of
from trainer.tasks.written import cut

_MOST = 10_000
_MESSAGES, _TEXT = "messages", "text"


@dataclass(frozen=True)
class Condition:
    """What one kind of record has in common.

    Attributes:
        given: the fields that the model does not write, and of a text or a dialogue its start.
        opening: the same as the model reads it.
    """

    given: Mapping[str, str]
    opening: Opening

    def __str__(self) -> str:
        """As a person has given it."""
        return ", ".join(f"{name}={value}" for name, value in self.given.items() if value) or "any record"


class Form:
    """How a task's record is made of what is given and of what its model writes.

    Args:
        task: of the model.
        spec: the same, by its settings.
        data: how the records' columns are called.

    Raises:
        InputError: the model has learnt answers, and no records.
    """

    def __init__(self, task: Any, spec: TaskSpec, data: RecordSettings) -> None:
        if not isinstance(task, WritingTask) or spec.name not in WRITES:
            raise InputError(
                f"federated.task is {spec.name!r}: its model has learnt answers, and writes no records; train one that "
                "does, with task 'chat' and template '{label}: {text}' for instance"
            )
        self._task, self._data = task, data
        *self._given, self._written = kind_of(spec.name).fields(spec)
        template = spec.template or getattr(kind_of(spec.name), "default_template", "")
        self._tail = cut(template)[2] if template else ""
        self._starts = not template

    @property
    def columns(self) -> list[str]:
        """Of the records, as the run's own data call them."""
        return [self._data.column(field) for field in (*self._given, self._written)]

    def conditions(self, texts: Sequence[str]) -> list[Condition]:
        """All combinations of the values that a person has given for the fields, ``FIELD=VALUE`` each.

        Raises:
            InputError: one is no such text, names no field that can be given, or a field has no value.
        """
        # A text may start anyhow, and a dialogue by what somebody asks.
        known = [self._written] if self._starts else self._given
        values: dict[str, list[str]] = {name: [] for name in known}
        for text in texts:
            name, equals, value = text.partition("=")
            if not equals or name not in values:
                raise InputError(f"--given {text!r}: give FIELD=VALUE; the fields are {', '.join(known) or 'none'}")
            values[name].append(mended(value, ReadCounts()))
        if self._written == _TEXT and self._starts:
            values[_TEXT] = values[_TEXT] or [""]
        if missing := next((name for name, found in values.items() if not found), None):
            raise InputError(f"--given: the model reads {missing!r} before it writes; give --given {missing}=VALUE")
        if (number := math.prod(len(found) for found in values.values())) > _MOST:
            raise InputError(f"--given: the values make {number:,} combinations; give {_MOST:,} at most")
        rows = (dict(zip(values, row, strict=True)) for row in product(*map(dict.fromkeys, values.values())))
        return [Condition(row, self._task.opened(self._row(row))) for row in rows]

    def _row(self, given: Mapping[str, str]) -> dict[str, Any]:
        return {_MESSAGES: ((USER, given[_MESSAGES]),)} if self._written == _MESSAGES else dict(given)

    def record(self, condition: Condition, written: str) -> dict[str, Any]:
        """A record with the columns of the run's own data."""
        given = condition.given
        text = written.removesuffix(self._tail.format_map(given) if self._tail else "").strip()
        found: dict[str, Any] = {**given, self._written: text}
        if self._starts and self._written == _TEXT:
            found[_TEXT] = f"{given[_TEXT]}{written}".strip()
        elif self._starts:
            turns = ((USER, given[_MESSAGES]), (ASSISTANT, text))
            found[_MESSAGES] = [{"role": ROLES[role], "content": said} for role, said in turns]
        return {self._data.column(field): value for field, value in found.items()}
