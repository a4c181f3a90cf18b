"""Which way of choosing tokens is best for a model's answers, by records with their right ones."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from configs.errors import InputError
from trainer.metrics.chrf import chrf
from trainer.tasks.task import AnsweringTask, DecodedTask, Encoded

LEAST = 20


class Way(NamedTuple):
    """How tokens are chosen. Nothing is drawn: a file's answers are the same each time."""

    beams: int = 1
    repetition_penalty: float = 1.0


WAYS = tuple(Way(beams, penalty) for penalty in (1.0, 1.1, 1.3) for beams in (1, 2, 4))


def ways_of(model: Any) -> list[Way]:
    """What is tried with a model; a recurrent one has no beams, which its state would not follow."""
    return [way for way in WAYS if way.beams == 1 or not getattr(model, "_is_stateful", False)]


def best_way(
    model: Any, task: DecodedTask, examples: Sequence[Encoded], most: int, tell: Callable[[int, int], None]
) -> tuple[Way, float, float]:
    """The way with which answers have most in common with the right ones, by mean chrF (Popović 2015).

    Args:
        model: in evaluation mode.
        task: what it answers.
        examples: with right answers. Ways are compared on every other one, and the rest is for the figures.
        most: tokens of an answer.
        tell: receives how many answers are written, and of how many.

    Returns:
        The way, and of the other examples the figure without it and with it.

    Raises:
        InputError: too few examples.
    """
    if len(examples) < LEAST:
        raise InputError(f"{len(examples)} records are too few to compare answers on; give {LEAST} or more")
    ways = ways_of(model)
    compared, others = examples[::2], examples[1::2]
    whole, done = len(ways) * len(compared) + 2 * len(others), 0

    def figure(way: Way, given: Sequence[Encoded]) -> float:
        nonlocal done
        answering, total = task.decoded(*way), 0.0
        for example in given:
            total += _in_common(answering, model, example, most)
            done += 1
            tell(done, whole)
        return total / len(given)

    # Of equal ones the first, which takes least time.
    best = max(ways, key=lambda way: figure(way, compared))
    return best, figure(Way(), others), figure(best, others)


def _in_common(task: AnsweringTask, model: Any, example: Encoded, most: int) -> float:
    (given,), (right,) = task.predictions(model, [example], most), task.references([example])
    return chrf(str(given.answer), right)
