"""Private evaluation: a silo scores its held-out units and releases noised sums of its units' bounded values.

Each unit gives a vector of four values from 0 to 1: clipped nats, clipped characters, tokens that the model holds
likeliest, and tokens, each over a public bound. So adding or removing a unit moves the vector of sums by at most 2
(2-norm). Where the plan names labels, their counts (``label_counts.py``) are part of the vector, and a unit moves it by
at most the square root of 6. The Gaussian noise is the plan's multiple of that. Bits per character, accuracy and F1 are
post-processing.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from configs.storage.manifests import Manifest
from federated.adapters.arrays import Arrays
from federated.adapters.warm_model import put_on
from federated.evaluation.label_counts import KINDS, SQUARED_SENSITIVITY, Example, f1_figures, label_counts
from privacy.mechanism.noise import noised_sums
from privacy.mechanism.streams import Streams
from privacy.plan import METRIC
from trainer.tasks.task import Encoded, Task

_VALUES = ("nats", "characters", "correct tokens", "tokens")
_NATS_PER_TOKEN = 8.0  # a unit's mean above this counts as this: a uniform guess among 3,000 tokens
_CHARACTERS_PER_TOKEN = 8.0
_LARGEST_SUM = 2.0**40  # of 2^33 units at most, and noise; so that no figure made of sums overflows
_STEP = 2.0**-20  # values are whole multiples of it, so that float64 sums of up to 2^33 units are exact


@dataclass(frozen=True)
class Bounds:
    """Public bounds of one unit, from the base model's context and the plan alone: no unit has more tokens.

    Attributes:
        context_length: in tokens.
        labels: of the plan's release; none: there are no counts of labels.
    """

    context_length: int
    labels: tuple[str, ...] = ()

    @property
    def scale(self) -> npt.NDArray[np.float64]:
        """What a value of 1 stands for, in the order of the first four sums."""
        return self.context_length * np.array([_NATS_PER_TOKEN, _CHARACTERS_PER_TOKEN, 1.0, 1.0])

    @property
    def num_sums(self) -> int:
        """Length of the vector."""
        return len(_VALUES) + len(KINDS) * len(self.labels)

    @property
    def sensitivity(self) -> float:
        """The most that one unit can move the whole vector (2-norm)."""
        return math.sqrt(len(_VALUES) + (SQUARED_SENSITIVITY if self.labels else 0.0))


def bounds_of(base_model: Manifest, labels: tuple[str, ...]) -> Bounds:
    """Bounds for a base model, from its manifest: the same at the silos and at the coordinator."""
    return Bounds(base_model.metadata["context_length"], labels)


@contextmanager
def evaluated(model: Any, adapter: Arrays | None) -> Iterator[None]:
    """The model with this adapter, or the base model alone, in evaluation mode."""
    model.eval()
    if adapter is None:
        trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
        try:
            with model.disable_adapter():
                yield
        finally:  # peft lets an A train that was frozen, in a model that other runs share
            for parameter, before in trains.items():
                parameter.requires_grad_(before)
        return
    put_on(model, adapter)
    yield


def private_sums(
    model: Any,
    task: Task,
    units: Sequence[Encoded],
    examples: Sequence[Example],
    bounds: Bounds,
    noise_multiplier: float,
    streams: Streams,
) -> list[float]:
    """The noised sums over a silo's held-out units: four, and three for each label.

    Args:
        model: in evaluation mode.
        task: what a unit is to the model.
        units: all held-out units; none is sampled.
        examples: those of them that end in a label.
        bounds: public.
        noise_multiplier: of the plan's release; the noise on each sum has ``noise_multiplier * bounds.sensitivity``.
        streams: the charge's random streams.
    """
    values = np.zeros(len(_VALUES))
    for unit in units:
        values += _unit_values(model, task, unit, bounds)
    counts = label_counts(model, task, examples, len(bounds.labels))
    sums = np.concatenate([values, counts.ravel()])
    return [float(value) for value in noised_sums(sums, noise_multiplier * bounds.sensitivity, streams, METRIC)]


def _unit_values(model: Any, task: Task, unit: Encoded, bounds: Bounds) -> npt.NDArray[np.float64]:
    """A unit's four values, from 0 to 1. A unit whose loss is not finite counts as the worst.

    The unit is scored by itself: beside others its values would be rounded differently, and one unit could move another
    one's values.
    """
    with torch.no_grad():
        nats, correct, tokens = task.record_scores(model, task.collate([unit])).numpy()[0]
    found = np.array([np.nan_to_num(nats, nan=np.inf), unit.characters, correct, tokens])
    return np.rint(np.clip(found / bounds.scale, 0.0, 1.0) / _STEP) * _STEP


def checked_sums(sums: Sequence[float], bounds: Bounds) -> list[float]:
    """A silo's sums as they came.

    Raises:
        ValueError: not as many numbers as the bounds say, or one is not finite or too large to be one of ours.
    """
    if len(sums) != bounds.num_sums or not all(abs(value) <= _LARGEST_SUM for value in sums):  # false for a NaN, too
        wanted = ", ".join(_VALUES) + (f", and {', '.join(KINDS)} of each label" if bounds.labels else "")
        found = f"its sums are {len(sums)} numbers, or one is not finite or beyond 2^40"
        raise ValueError(f"{found}: they should be {bounds.num_sums}: {wanted}")
    return list(sums)


def figures(sums: Sequence[Sequence[float]], bounds: Bounds, noise_multiplier: float) -> dict[str, Any]:
    """Bits per character, next-token accuracy and F1 over all silos, with the standard errors due to the noise.

    Args:
        sums: the noised sums of each silo.
        bounds: as the silos used them.
        noise_multiplier: of the plan's release.

    Returns:
        None for what the noise has left without a positive denominator; F1 only where there are labels.
    """
    total = np.reshape(sums, (len(sums), bounds.num_sums)).sum(axis=0)
    error = math.sqrt(len(sums)) * noise_multiplier * bounds.sensitivity
    nats, characters, correct, tokens = total[: len(_VALUES)] * bounds.scale
    errors = error * bounds.scale
    bits, bits_error = _ratio(nats / math.log(2), characters, errors[0] / math.log(2), errors[1])
    accuracy, accuracy_error = _ratio(correct, tokens, errors[2], errors[3])
    found = {
        "bits_per_char": bits,
        "bits_per_char_error": bits_error,
        "accuracy": accuracy,
        "accuracy_error": accuracy_error,
    }
    if not bounds.labels:
        return found
    counts = total[len(_VALUES) :].reshape(len(KINDS), len(bounds.labels))
    return {**found, **f1_figures(counts, error, bounds.labels)}


def _ratio(above: float, below: float, above_error: float, below_error: float) -> tuple[float | None, float | None]:
    """A ratio of two noised sums, and its standard error to first order."""
    if below <= below_error:
        return None, None
    ratio = above / below
    return float(ratio), float(math.hypot(above_error, ratio * below_error) / below)
