"""A model that gives labels, or shows where an answer stands: what it answers to records."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster.finished import check_head
from cluster.serving.claims import Claim
from configs.errors import InputError
from configs.schema.data import RecordSettings
from configs.schema.tasks import TaskSpec
from trainer.data.tokenizer import load_tokenizer
from trainer.explanation.attribution import explain
from trainer.inference.asking import Asking
from trainer.inference.predicting import by_label
from trainer.models.load import model_class
from trainer.tasks.task import Encoded, Prediction, task_of

_AT_ONCE = 32  # records, after which another request may come first, and one that nobody waits for ends
_EXPLAINED = ("classification", "multilabel", "entities")
_OWN_NAMES = RecordSettings(source="a request")  # fields have the task's names, not those of somebody's files


class LabelModel:
    """A model that answers records under a name, in a thread of its own.

    Args:
        name: the name.
        claim: about its privacy.
        model: in evaluation mode.
        spec: its task.
        tokens: the folder with its tokenizer.
        context_length: most tokens that it reads; None: what that folder's manifest says.
        calibrated: gives the task as its answers are to be read.

    Attributes:
        fields: that a record has.
        context_length: most tokens of one.

    Raises:
        InputError: the model has another task's head, or other labels.
    """

    def __init__(
        self,
        name: str,
        claim: Claim,
        model: Any,
        spec: TaskSpec,
        tokens: Path,
        context_length: int | None,
        calibrated: Callable[[Any], Any] = lambda task: task,
    ) -> None:
        task = task_of(spec, tokens, context_length)
        of_task = task.head and model_class(model.config, str(tokens), task.head).__name__
        if type(model).__name__ != of_task:
            raise InputError(f"{name}: has another head than the task {spec.name!r}; give the settings of its own run")
        check_head(model, task, tokens)
        task = calibrated(task)
        self.name, self.claim, self.context_length = name, claim, task.context_length
        self._spec, self._task, self._model, self._tokenizer = spec, task, model, load_tokenizer(tokens)
        self._asking = Asking(model, self._tokenizer, task, spec, _OWN_NAMES, max_new_tokens=1)
        self.fields = self._asking.columns
        self._thread = ThreadPoolExecutor(1, f"predicting-{name}")

    @property
    def about(self) -> dict[str, Any]:
        """What a client has to know to ask it."""
        explains = self._spec.name in _EXPLAINED and find_spec("captum") is not None
        labels = list(self._spec.labels)
        return {"task": self._spec.name, "fields": self.fields, "labels": labels, "explains": explains}

    async def answer(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The document that answers these records, in their order.

        Raises:
            InputError: one of them can't be answered. It is named by its place, and not quoted.
        """
        loop = asyncio.get_running_loop()
        found: list[Prediction] = []
        examples = await loop.run_in_executor(self._thread, self._read, records)
        for start in range(0, len(examples), _AT_ONCE):
            several = examples[start : start + _AT_ONCE]
            found += await loop.run_in_executor(self._thread, self._asking.answers, several)
        return {"object": "list", "model": self.name, "predictions": [self._shown(one) for one in found]}

    async def explain(self, text: str) -> dict[str, Any]:
        """The document that says which words of a text speak for each answer to it.

        Raises:
            InputError: the text is empty, this task can't be explained, or captum is not installed.
        """
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._thread, explain, self._task, self._tokenizer, self._model, text)
        return {"object": "list", "model": self.name, "explanations": [asdict(one) for one in found]}

    def _read(self, records: Sequence[Mapping[str, Any]]) -> list[Encoded]:
        return [self._example(record, f"records.{place}") for place, record in enumerate(records)]

    def _example(self, record: Mapping[str, Any], where: str) -> Encoded:
        if not record.keys() <= set(self.fields):
            raise InputError(f"{where}: {self.name} reads {', '.join(self.fields)}; send nothing else")
        return self._asking.example(record, where)

    def _shown(self, found: Prediction) -> dict[str, Any]:
        answer = found.answer if isinstance(found.answer, str) else list(found.answer)
        return {"answer": answer, "probabilities": by_label(found, self._spec.labels) if found.probabilities else None}
