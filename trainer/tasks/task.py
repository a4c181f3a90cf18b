"""What a record is to a model, whatever the task; and the tasks there are, by name."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from configs.errors import InputError
from configs.schema.tasks import TaskSpec
from configs.storage.manifests import read_manifest
from trainer.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import torch

    from trainer.metrics.measures import Measures
    from trainer.models.load import Head
    from trainer.tasks.fields import Kind

IGNORED = -100
Row = Mapping[str, Any]
"""A record's fields, as ``trainer.tasks.fields`` has read them."""


@dataclass(frozen=True)
class Encoded:
    """One example as tokens.

    Attributes:
        ids: what the model reads, special tokens included.
        characters: characters of the text that the tokens cover.
        truncated: whether the text was longer than the context.
        target: what the model should answer, in the task's own numbers; empty where the text itself is that.
        words: 1 for each token of what the record says that is read and not learnt, which augmentation may change; 0
            for the others. Empty where nothing may be changed.
    """

    ids: tuple[int, ...]
    characters: int
    truncated: bool
    target: tuple[int, ...] = ()
    words: bytes = b""


@dataclass(frozen=True)
class Opening:
    """What a model reads before it writes.

    Attributes:
        ids: tokens.
        continued: whether what it writes goes on with the prompt's own words; else it is an answer to them.
        ends: tokens that end what it writes.
    """

    ids: tuple[int, ...]
    continued: bool
    ends: tuple[int, ...]


@dataclass(frozen=True)
class Prediction:
    """What a model answers to an example.

    Attributes:
        answer: a text; a label, or those that it chooses; or a tag for each word that it has read.
        probabilities: what it gives each of the task's labels, in their order; empty where it chooses none for a text.
    """

    answer: str | tuple[str, ...]
    probabilities: tuple[float, ...] = ()


@dataclass(frozen=True)
class Calibration:
    """How what a model says of labels becomes probabilities and choices.

    Attributes:
        temperature: what is said is divided by it.
        thresholds: of each label's probability, above which a text has the label; empty: half.
    """

    temperature: float = 1.0
    thresholds: tuple[float, ...] = ()


class Task(Protocol):
    """How records become a batch, and what an example's loss is: a function of that example alone.

    Attributes:
        name: of its kind.
        context_length: most tokens of an example.
        head: what the model has instead of the words that it would say; None: nothing else.
        measures: what is measured of an answer.
    """

    name: str
    context_length: int
    head: Head | None
    measures: Measures

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""

    def unknown(self, example: Encoded) -> tuple[int, int]:
        """How many of an example's tokens stand for what the tokenizer doesn't know, and how many there are."""

    def examples(self, rows: Sequence[Row]) -> tuple[Encoded, ...]:
        """The examples that a unit's rows make: one or several, of which a step takes one."""

    def scored(self, rows: Sequence[Row]) -> tuple[Encoded, ...]:
        """What is scored of a unit's rows: mostly the examples themselves."""

    def shape(self, example: Encoded) -> Hashable:
        """All that decides the shape of an example's computation; a function of that example alone."""

    def made_up(self, shape: Any, number: int) -> list[Encoded]:
        """Examples of a shape without any data, all different."""

    def synthetic(self) -> list[Encoded]:
        """At least two made-up examples, of several shapes."""

    def collate(self, examples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """The examples as one batch."""

    def record_losses(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Training loss of each example, shape (B,)."""

    def record_scores(self, model: Any, examples: Sequence[Encoded]) -> torch.Tensor:
        """What is measured of each answer of the model, in the order of ``measures``. Shape (B, S), float64."""


@runtime_checkable
class AnsweringTask(Task, Protocol):
    """A task that asks for an answer, which is right or not."""

    def predictions(self, model: Any, examples: Sequence[Encoded], max_new_tokens: int, /) -> list[Prediction]:
        """What the model answers to each example; where it writes, in so many tokens at most."""

    def references(self, examples: Sequence[Encoded], /) -> list[Any]:
        """The right answers, each as a prediction's; of a question all that are right."""


@runtime_checkable
class LabellingTask(Task, Protocol):
    """A task whose answers are labels, each with a probability."""

    def calibrated(self, calibration: Calibration, /) -> Task:
        """The same task, whose answers are read so."""

    def judged(self, model: Any, examples: Sequence[Encoded], /) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model says of each label (B, L), and whether each is right (B, L)."""


class DecodedTask(AnsweringTask, Protocol):
    """A task whose answers are written token by token."""

    def decoded(self, beams: int, repetition_penalty: float, /) -> AnsweringTask:
        """The same task, whose predictions are written by a search with so many beams and such a penalty."""


@runtime_checkable
class PromptedTask(Task, Protocol):
    """A task that asks for an answer, and can show before that what answers are."""

    def with_shots(self, rows: Sequence[Row]) -> Task:
        """The same task, with these worked examples before each prompt."""


@runtime_checkable
class WritingTask(Task, Protocol):
    """A task of which the model learns to write."""

    def opening(self, prompt: str) -> Opening:
        """What a prompt is to the model."""

    def opened(self, row: Row) -> Opening:
        """The same of a record's fields without its answer; of a text its start."""


@runtime_checkable
class AugmentedTask(Task, Protocol):
    """A task that reads tokens which it does not learn: they may change, and what is learnt stays."""

    @property
    def mask_token(self) -> int | None:
        """What stands in place of a token that is not shown; None: the model has no such token."""

    def target_at(self, example: Encoded, places: Sequence[int]) -> tuple[int, ...]:
        """What is to be answered where of an example's tokens these alone are read."""


class TextTask(Task, Protocol):
    """A task whose records are texts, of which the model says every word."""

    def encode(self, text: str) -> Encoded:
        """Tokens of a text, truncated to the context."""

    def record_nats(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Negative log-likelihood of each text in nats, shape (B,)."""


class TaskKind(Protocol):
    """What is known of a task before there is a model: a class, whose instances are ``Task``s."""

    name: str

    def __call__(self, tokenizer: Any, context_length: int, spec: TaskSpec) -> Task:
        """The task with a model's tokenizer."""

    def fields(self, spec: TaskSpec) -> dict[str, Kind]:
        """The fields of a record, and how each is read."""

    def misfit(self, row: Row) -> str:
        """What does not fit together in a record, in words without any of its values; empty: nothing."""

    def measured(self, spec: TaskSpec, context_length: int) -> Measures:
        """What is measured of an answer: the same at whoever computes it and whoever adds it up."""


def _tasks() -> dict[str, Any]:  # of TaskKind: mypy takes no class for a protocol with __call__
    from trainer.tasks.chat import ChatTask
    from trainer.tasks.classification import ClassificationTask, MultilabelTask
    from trainer.tasks.entities import EntitiesTask
    from trainer.tasks.qa import AnswersTask
    from trainer.tasks.text import CausalTask  # which needs the examples above
    from trainer.tasks.text_to_text import SummarisationTask, TranslationTask

    labelling = (ClassificationTask, MultilabelTask, EntitiesTask, AnswersTask)
    writing = (ChatTask, TranslationTask, SummarisationTask)
    return {kind.name: kind for kind in (CausalTask, *labelling, *writing)}


def kind_of(name: str) -> TaskKind:
    """The task of that name, before there is a model.

    Raises:
        InputError: there is no such task.
    """
    tasks = _tasks()
    if name not in tasks:
        raise InputError(f"task {name!r}: there is none of that name; give one of {', '.join(tasks)}")
    kind: TaskKind = tasks[name]
    return kind


def task_of(spec: TaskSpec, model_directory: Path, context_length: int | None = None) -> Task:
    """A task, with the tokenizer of an exported model, and with its context length where none is given.

    Raises:
        InputError: there is no such task, the model's manifest does not name a context length, or the task can't be
            done with this model, tokenizer or context.
    """
    kind = kind_of(spec.name)
    other = getattr(kind, "with_encoder", None)  # of a kind that serves two sorts of models
    if other is not None and has_both_sides(model_directory):
        kind = other
    if spec.pooling == "likelihood":
        from trainer.tasks.likelihood import LikelihoodTask

        refuse_all_but_decoders(model_directory)
        kind = LikelihoodTask
    return kind(load_tokenizer(model_directory), context_length or context_length_of(model_directory), spec)


def has_both_sides(model_directory: Path) -> bool:
    """Whether an exported model has an encoder and a decoder."""
    from transformers import AutoConfig

    return bool(AutoConfig.from_pretrained(model_directory, local_files_only=True).is_encoder_decoder)


def refuse_all_but_decoders(model_directory: Path) -> None:
    """Refuses an exported model that says nothing of the next word.

    Raises:
        InputError: it is an encoder, or an encoder-decoder.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    import trainer.models.recurrent  # noqa: F401  # which the Auto classes know from then on

    config = AutoConfig.from_pretrained(model_directory, local_files_only=True)
    decoder, named = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), (config.architectures or [""])[0]
    if config.is_encoder_decoder or decoder is None or decoder.__name__ != named:
        raise InputError(
            f"pooling is 'likelihood': the base model is a {named or config.model_type}, which does not go on with a "
            "text; give a decoder, or another pooling"
        )


def text_task(spec: TaskSpec, model_directory: Path) -> TextTask:
    """The same for what needs texts: an audit's canaries, for instance.

    Raises:
        InputError: as ``task_of``, or the task is another one.
    """
    from trainer.tasks.text import CausalTask

    if spec.name != CausalTask.name:
        raise InputError(
            f"federated.task is {spec.name!r}: an audit plants texts and looks for them; audit the same plan with "
            f"federated.task = {CausalTask.name!r}"
        )
    return CausalTask(load_tokenizer(model_directory), context_length_of(model_directory), spec)


def context_length_of(model_directory: Path) -> int:
    """Most tokens that an exported model reads.

    Raises:
        InputError: its manifest doesn't say.
    """
    manifest = read_manifest(model_directory, "model")
    context_length = manifest.metadata.get("context_length") if manifest else None
    if not isinstance(context_length, int):
        raise InputError(
            f"{model_directory}: its manifest names no context_length; give a base model that `siloweave export` made"
        )
    return context_length


def by_length(records: Sequence[Encoded], micro_batch_size: int) -> Iterator[list[Encoded]]:
    """Micro-batches of records of like length: less padding, the same sum."""
    ordered = sorted(records, key=lambda record: len(record.ids))
    for start in range(0, len(ordered), micro_batch_size):
        yield list(ordered[start : start + micro_batch_size])


def longest_shape(task: Task) -> Any:
    """The shape of examples that fill the context: a length, or one for each of two texts."""
    shape = task.shape(task.synthetic()[0])
    return (task.context_length,) * len(shape) if isinstance(shape, tuple) else task.context_length


def shapes(task: Task) -> list[Any]:
    """All shapes that an example may have, shortest first: each padded length, or each pair of them."""
    lengths = range(1, task.context_length + 1)
    found = (task.shape(Encoded((0,) * length, 0, truncated=False, target=(0,) * length)) for length in lengths)
    alone: list[Any] = list(dict.fromkeys(found))
    if not isinstance(alone[0], tuple):
        return alone
    each = [length for length, _ in alone]
    return sorted(((one, other) for one in each for other in each), key=sum)
