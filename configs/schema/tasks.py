"""What a record is to the model: the same words at the coordinator, in a request, and in a silo's policy."""

import re
import string
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from configs.schema.base import Label, Settings, composed

TaskName = Literal["causal", "classification", "multilabel", "entities", "qa", "chat", "translation", "summarisation"]
Pooling = Literal["model", "mean", "likelihood"]
MOST_LABELS = 300  # three counts for each are in a private evaluation
LARGEST_TEMPLATE = 2000  # characters
TaskLabels = Annotated[tuple[Label, ...], Field(max_length=MOST_LABELS), AfterValidator(composed)]
"""The federation's labels in their order, in Unicode's form NFC."""
WITH_LABELS = ("classification", "multilabel", "entities")
POOLED = ("classification", "multilabel")
WITH_TEMPLATE = ("classification", "multilabel", "chat", "translation", "summarisation")
WRITTEN = ("chat", "translation", "summarisation")  # whose answer is text
WRITES = ("causal", *WRITTEN)
AUGMENTED = (*POOLED, *WRITTEN)  # what is read is apart from what is learnt
_COLUMN = re.compile(r"[A-Za-z_]\w*")


class TaskSpec(Settings):
    """What a model learns of a record.

    Attributes:
        name: of the task.
        labels: what it tells apart, where it tells something apart.
        template: how a record's text is made of its columns; empty: the column ``text`` is the text.
        pooling: what of a text a head looks at, where it looks at the whole of it; ``likelihood``: there is no head.
        language: of a source's texts, by whose rules answers are compared. Each silo's own, and in no request.
    """

    name: TaskName = "causal"
    labels: TaskLabels = ()
    template: Annotated[str, Field(max_length=LARGEST_TEMPLATE)] = ""
    pooling: Pooling = "model"
    language: str = "en"

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that the template names, each once."""
        return template_fields(self.template)

    @property
    def in_words(self) -> bool:
        """Whether a model answers with its own words, and has no head for the task."""
        return self.name in WRITES or self.pooling == "likelihood"


CAUSAL = TaskSpec()
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class AugmentationSettings(Settings):
    """What a step changes in the words that it reads, drawn anew for each unit and step; what is learnt stays."""

    dropout: Share = 0.0
    """Share of the tokens that are left out."""
    swap: Share = 0.0
    """Share of the tokens that change places with the next one."""
    mask: Share = 0.0
    """Share of the tokens in whose place the model's mask token stands, for models that have one."""

    @property
    def largest(self) -> float:
        """The largest of the shares; 0: nothing is changed."""
        return max(self.dropout, self.swap, self.mask)


NO_AUGMENTATION = AugmentationSettings()


def template_fields(template: str) -> tuple[str, ...]:
    """The fields in braces, each once.

    Raises:
        ValueError: the template is none: braces that don't match, or hold more than a field's name.
    """
    names = [name for _, name, *rest in string.Formatter().parse(template) if name is not None or any(rest)]
    if wrong := [name for name in names if not _COLUMN.fullmatch(name or "")]:
        raise ValueError(f"a field named {wrong[0]!r}")
    if "{" in re.sub(r"\{\w+\}|\{\{|\}\}", "", template):
        raise ValueError("a field with a conversion or a format")
    return tuple(dict.fromkeys(filter(None, names)))


def task_problems(
    where: str, task: TaskName, labels: tuple[str, ...], template: str, pooling: Pooling
) -> Iterator[str]:
    """What does not fit together in a task's settings, one line each; ``where`` is the table that they stand in."""
    if pooling != "model" and task not in POOLED:
        yield f"{where}.pooling is {pooling!r}: the task {task!r} has no use for it; leave it out"
    if pooling == "likelihood" and task == "multilabel":
        yield f"{where}.pooling is {pooling!r}: it finds one label, and the task {task!r} has several; leave it out"
    if task in WITH_LABELS and not labels:
        yield f"{where}.labels is empty: the task {task!r} needs the labels that it tells apart; give two or more"
    if labels and task not in WITH_LABELS:
        yield f"{where}.labels is {list(labels)}: the task {task!r} has no use for labels; leave them out"
    if task == "entities" and (wrong := _tag_problem(labels)):
        yield f"{where}.labels is {list(labels)}: {wrong}"
    if template and task not in WITH_TEMPLATE:
        yield f"{where}.template is {template!r}: the task {task!r} has no use for a template; leave it out"
        return
    try:
        found = template_fields(template)
    except ValueError as error:
        yield (
            f"{where}.template is {template!r}: it has {error}; name fields in braces, as in 'Title: {{title}}', and "
            "double a brace that is text"
        )
        return
    if template and not found:
        yield f"{where}.template is {template!r}: it names no field; name at least one in braces, as in '{{text}}'"
    if task in POOLED and (wrong := _answer_problem(task, template, pooling)):
        yield f"{where}.template is {template!r}: {wrong}"


def _answer_problem(task: TaskName, template: str, pooling: Pooling) -> str:
    """Why a template leaves a model nothing to find out, where it does."""
    answer = "label" if task == "classification" else "labels"
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    if answer in (names[:-1] if pooling == "likelihood" else names):
        return f"it would tell the {answer} that is asked for; leave {{{answer}}} out"
    if names == [answer]:
        return "it names no field by which that could be told; name one, as in '{text}'"
    return ""


def _tag_problem(tags: tuple[str, ...]) -> str:
    """Why these are no tags of entities, where they aren't."""
    types = [tag[2:] for tag in tags if tag.startswith("B-")]
    if "O" not in tags:
        return "there is no 'O', the tag of a word outside of all entities; give it, too"
    for tag in tags:
        if tag != "O" and not re.fullmatch(r"[BI]-.+", tag):
            return f"{tag!r} is no tag; give 'O', and 'B-NAME' and 'I-NAME' for each kind of entity"
        if tag.startswith("I-") and tag[2:] not in types:
            return f"{tag!r} has no {'B' + tag[1:]!r}, with which its entities begin; give that, too"
    return "" if types else "there is no entity among them; give 'B-NAME' and 'I-NAME' for each kind"


def augmentation_problem(setting: str, task: TaskName, largest: float) -> str:
    """Why what a task reads can't be changed, where it can't; ``setting`` is the one that asks for it."""
    if not largest or task in AUGMENTED:
        return ""
    return (
        f"{setting} is {largest:g}: the task {task!r} learns the tokens that it reads, or where they stand; give 0, or "
        f"one of the tasks {', '.join(AUGMENTED)}"
    )


def deidentify_problem(task: TaskName, enabled: bool) -> str:
    """Why a task's records can't be de-identified, where they can't."""
    if not enabled or task != "entities":
        return ""
    return (
        "data.deidentify.enabled is true: the task 'entities' has tags for single words, inside which nothing can be "
        "replaced; set it to false, and take out identifiers where the tags are made"
    )
