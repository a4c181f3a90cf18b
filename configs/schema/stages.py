"""Stages of a training: some of its steps or rounds with settings of their own, one stage after the other."""

from collections.abc import Collection, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field

from configs.schema.base import Count, Positive, Settings
from configs.schema.data import CorpusName

SHORTEST_CONTEXT = 8


def _layers_or_embeddings(value: Any) -> Any:
    """In one line; a choice of two types gives one for each."""
    if value is None or value == "embeddings" or (type(value) is int and value > 0):
        return value
    raise ValueError(f"frozen is {value!r}: give a number of layers, 1 or more, or 'embeddings'")


Frozen = Annotated[Literal["embeddings"] | Count | None, BeforeValidator(_layers_or_embeddings)]


class TrainingStage(Settings):
    """Some of the steps of pretraining, in the order of the file. What is left out is as it is for the whole."""

    steps: Count
    """Optimizer steps; those of all stages add up to ``pretrain.steps``."""
    weights: dict[CorpusName, Positive] = Field(default_factory=dict)
    """Corpora of this stage, each with its share of the samples relative to the others: ``{public = 1, code = 3}``;
    left out: all, with their own weights."""
    context_length: Annotated[int, Field(ge=SHORTEST_CONTEXT)] | None = None
    """Longest sequence in this stage, in tokens, at most ``model.context_length``."""
    learning_rate: Positive | None = None
    """Peak of a schedule of this stage's own: ``pretrain.schedule`` over this stage's steps, ``pretrain.warmup_steps``
    included. Left out: the schedule over all steps goes on."""
    frozen: Frozen = None
    """What keeps its weights: ``embeddings``, or these and so many of the lowest layers; left out: nothing."""


class RoundStage(Settings):
    """Some of the rounds of fine-tuning, in the order of the file. What is left out is as it is for the whole."""

    rounds: Count
    """Rounds; those of all stages add up to ``federated.rounds``."""
    learning_rate: Positive | None = None
    """Learning rate inside a silo."""
    context_length: Annotated[int, Field(ge=SHORTEST_CONTEXT)] | None = None
    """Longest example in this stage, in tokens, at most ``model.context_length``. Evaluations read all of it."""
    frozen: Frozen = None
    """What of all that trains stays as it is, and is not sent back: what lies in or beside the ``embeddings``, or there
    and in so many of the lowest layers; left out: nothing."""


class Stage(NamedTuple):
    """A stage of pretraining with what it leaves to the whole filled in.

    Attributes:
        first: its first step, counted from 0.
        steps: how many.
        context_length: longest sequence.
        weights: share of each of its corpora.
        frozen_below: depth below which parameters keep their weights; embeddings have depth 0, the lowest layer 1.
    """

    first: int
    steps: int
    context_length: int
    weights: dict[str, float]
    frozen_below: int


def resolved(stages: Sequence[TrainingStage], context_length: int, weights: dict[str, float]) -> tuple[Stage, ...]:
    """The stages as they are trained.

    Args:
        stages: as the file has them, or one that is the whole.
        context_length: the model's.
        weights: the corpora's own.
    """
    found: list[Stage] = []
    for stage in stages:
        length, share = stage.context_length or context_length, stage.weights or weights
        first = found[-1].first + found[-1].steps if found else 0
        found.append(Stage(first, stage.steps, length, share, frozen_below(stage.frozen)))
    return tuple(found)


def stage_problems(
    stages: Sequence[TrainingStage], corpora: Collection[str], context_length: int, layers: int | None
) -> Iterator[str]:
    """What of pretraining's stages does not fit the whole.

    Args:
        stages: as the file has them.
        corpora: the names of the public corpora.
        context_length: the model's.
        layers: of the model; None where its configuration alone says it.
    """
    for number, stage in enumerate(stages):
        name, known = f"pretrain.stages.{number}", ", ".join(corpora)
        if unknown := sorted(set(stage.weights) - set(corpora)):
            yield f"{name}.weights has {unknown[0]!r}: no such corpus; give of {known}, or add it to data.corpora"
        yield from model_problems(name, stage, context_length, layers)


def model_problems(
    name: str, stage: TrainingStage | RoundStage, context_length: int, layers: int | None
) -> Iterator[str]:
    """What of a stage is beyond the model: its length, or what it freezes."""
    if stage.context_length and stage.context_length > context_length:
        yield f"{name}.context_length is {stage.context_length}: give at most model.context_length ({context_length})"
    if layers and isinstance(stage.frozen, int) and stage.frozen > layers:
        yield f"{name}.frozen is {stage.frozen}: give at most model.layers ({layers})"


def numbered(lengths: Sequence[int], position: int) -> dict[str, int]:
    """What an event says of the stage of a step or round (from 0), where there are several."""
    return {"training_stage": stage_at(lengths, position)[0] + 1, "training_stages": len(lengths)} if lengths else {}


def frozen_below(frozen: Frozen) -> int:
    """Parameters that lie below this depth are frozen; embeddings have depth 0, the lowest layer 1."""
    return 0 if frozen is None else 1 if frozen == "embeddings" else frozen + 1


def stage_at(lengths: Sequence[int], position: int) -> tuple[int, int]:
    """The stage that holds a step or a round.

    Args:
        lengths: of the stages.
        position: the step or round, counted from 0; what follows the last stage belongs to it.

    Returns:
        The stage's index, and its first step or round.
    """
    first = 0
    for index, length in enumerate(lengths[:-1]):
        if position < first + length:
            return index, first
        first += length
    return len(lengths) - 1, first
