"""What pretraining minimises, whatever it is; and the objectives there are, by name."""

from pathlib import Path
from typing import Any, Protocol

from configs.schema.schema import RunConfig
from trainer.data.packing import Windows
from trainer.objectives.causal import Causal
from trainer.objectives.masked import Masked
from trainer.objectives.next_sentence import NextSentence
from trainer.objectives.pieces import Examples
from trainer.objectives.span_corruption import SpanCorruption

_PACKED = ("llama", "gpt2")


class Objective(Protocol):
    """Makes examples of windows, and says what their loss is.

    The loss of a batch is the sum of its terms, each of which is a sum over all ranks divided by its number of targets
    over all ranks.

    Attributes:
        terms: how many there are.
    """

    terms: int

    def examples(self, windows: Windows) -> Examples:
        """What the model is given: a function of the windows, their numbers and the run's seed."""

    def sums(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Each term's sum over examples whose inputs are tensors, shape (terms,)."""


def new_objective(config: RunConfig, tokenizer: Path) -> Objective:
    """The run's objective.

    Args:
        config: the run's settings.
        tokenizer: directory of the corpus' tokenizer.
    """
    if config.objective == "masked":
        return Masked(tokenizer, config.run.seed)
    if config.objective == "next_sentence":
        return NextSentence(tokenizer, config.run.seed)
    if config.objective == "span_corruption":
        return SpanCorruption(config.run.seed)
    return Causal(packed=not config.model.config and config.model.family in _PACKED)
