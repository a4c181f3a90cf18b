"""Private evaluation: a silo scores its held-out units and releases noised sums of its units' bounded values.

A unit gives what its task measures of it (``Task.measures``), the mean over its examples: values from 0 to 1, each over
a public bound, and counts of labels whose length is bounded as a whole. So adding or removing a unit moves the vector
of sums by at most the length that such a vector can have, and the Gaussian noise is the plan's multiple of that. For a
text the values are clipped nats, clipped characters, tokens that the model holds likeliest, and tokens; where the plan
names labels, their counts (``label_counts.py``) follow. Where it has the model write its answers, what they have in
common with the right ones is one value more. Bits per character, accuracy and F1 are post-processing.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from configs.schema.tasks import TaskSpec
from configs.storage.manifests import Manifest
from federated.adapters.arrays import Arrays
from federated.adapters.warm_model import put_on
from federated.evaluation.label_counts import SQUARED_SENSITIVITY, Example, label_counts
from privacy.mechanism.noise import noised_sums
from privacy.mechanism.streams import Streams
from privacy.plan import METRIC
from trainer.device import beside
from trainer.metrics.measures import COUNTS, Measures
from trainer.tasks.task import Encoded, Task, kind_of

_LARGEST_SUM = 2.0**40  # of 2^33 units at most, and noise; so that no figure made of sums overflows
_STEP = 2.0**-20  # values are whole multiples of it, so that float64 sums of up to 2^33 units are exact


@dataclass(frozen=True)
class Bounds:
    """Public bounds of one unit, from the base model's context, the task and the plan alone.

    Attributes:
        measures: what is measured of a unit.
        max_new_tokens: most tokens that the model writes for an example; 0: it writes none.
    """

    measures: Measures
    max_new_tokens: int = 0

    @property
    def scale(self) -> npt.NDArray[np.float64]:
        """What a value of 1 stands for, sum by sum. A count stands for itself."""
        return np.concatenate([self.measures.scale, np.ones(len(COUNTS) * len(self.measures.labels))])

    @property
    def num_sums(self) -> int:
        """Length of the vector."""
        return self.measures.num_sums

    @property
    def sensitivity(self) -> float:
        """The most that one unit can move the whole vector (2-norm)."""
        return math.hypot(math.sqrt(len(self.measures.bounds)), self.measures.counts_norm)


def bounds_of(base_model: Manifest, spec: TaskSpec, labels: tuple[str, ...], max_new_tokens: int = 0) -> Bounds:
    """Bounds for a base model, from its manifest, and a task: the same at the silos and at the coordinator.

    Args:
        base_model: whose context bounds a text.
        spec: the task.
        labels: of the plan's release, for texts that end in one of them.
        max_new_tokens: of the plan's release, for tasks whose answer is text.
    """
    measures = kind_of(spec.name).measured(spec, base_model.metadata["context_length"])
    if labels:
        measures = replace(measures, labels=labels, counts_norm=math.sqrt(SQUARED_SENSITIVITY))
    return Bounds(measures.with_overlap() if max_new_tokens else measures, max_new_tokens)


def evaluation_after(round_number: int, rounds: int, evaluations: int) -> int | None:
    """Number of the private evaluation that follows a round; None where none does.

    A single one follows the last round; of several the first is of the base model, before round 1.
    """
    parts = max(evaluations - 1, 1)
    after = {rounds * (number + (evaluations == 1)) // parts: number + 1 for number in range(evaluations)}
    return after.get(round_number)


@contextmanager
def evaluated(model: Any, adapter: Arrays | None) -> Iterator[None]:
    """The model with this adapter, or the base model alone, in evaluation mode; new tensors lie where it does."""
    model.eval()
    with beside(model), _adapted(model, adapter):
        yield


@contextmanager
def _adapted(model: Any, adapter: Arrays | None) -> Iterator[None]:
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
    units: Sequence[Sequence[Encoded]],
    examples: Sequence[Example],
    bounds: Bounds,
    noise_multiplier: float,
    streams: Streams,
) -> list[float]:
    """The noised sums over a silo's held-out units: of its bounded values, and three for each label.

    Args:
        model: in evaluation mode.
        task: what a unit is to the model.
        units: all held-out units, each as its examples; none is sampled.
        examples: those of them whose text ends in a label of the plan.
        bounds: public.
        noise_multiplier: of the plan's release; the noise on each sum has ``noise_multiplier * bounds.sensitivity``.
        streams: the charge's random streams.
    """
    sums, bounded = np.zeros(bounds.num_sums), len(bounds.measures.bounds)
    for unit in units:
        found = _unit_values(model, task, unit, bounds)
        sums[: len(found)] += found
    if examples:
        sums[bounded:] += label_counts(model, task, examples, len(bounds.measures.labels)).ravel()
    return [float(value) for value in noised_sums(sums, noise_multiplier * bounds.sensitivity, streams, METRIC)]


def _unit_values(model: Any, task: Task, unit: Sequence[Encoded], bounds: Bounds) -> npt.NDArray[np.float64]:
    """A unit's values, from 0 to 1, and its counts: the mean over its examples. A loss that isn't finite is the worst.

    Each example is scored by itself: beside others its values would be rounded differently, and one unit could move
    another one's values.
    """
    measures, found = bounds.measures, np.zeros(0)
    bounded = len(measures.bounds)
    for number, example in enumerate(unit):
        scores = np.nan_to_num(_example_values(model, task, example, bounds.max_new_tokens), nan=np.inf)
        scores[:bounded] = np.clip(scores[:bounded] / measures.scale, 0.0, 1.0)
        scores[bounded:] = _shortened(scores[bounded:], measures.counts_norm)
        found = scores if number == 0 else found + scores
    found /= max(len(unit), 1)
    # Counts are rounded down: rounded up, they could be longer than their bound.
    return np.concatenate([np.rint(found[:bounded] / _STEP), np.floor(found[bounded:] / _STEP)]) * _STEP


def _example_values(model: Any, task: Any, example: Encoded, max_new_tokens: int) -> npt.NDArray[np.float64]:
    """What the task measures; and where the model writes, after the bounded values, what its answer has in common."""
    with torch.no_grad():
        scores: npt.NDArray[np.float64] = task.record_scores(model, [example]).cpu().numpy()[0]
    if not max_new_tokens:
        return scores
    return np.insert(scores, len(task.measures.bounds), task.overlaps(model, [example], max_new_tokens))


def _shortened(counts: npt.NDArray[np.float64], longest: float) -> npt.NDArray[np.float64]:
    """One example's counts, all by the same factor, so that they are no longer than their bound (2-norm).

    Counts are whole numbers, so their norm has one rounding, the factor another, each product a third: together less
    than the 2^-50 that is taken off.
    """
    length = float(np.linalg.norm(counts))
    return counts if length <= longest else counts * (longest / length * (1 - 2.0**-50))


def checked_sums(sums: Sequence[float], bounds: Bounds) -> list[float]:
    """A silo's sums as they came.

    Raises:
        ValueError: not as many numbers as the bounds say, or one is not finite or too large to be one of ours.
    """
    if len(sums) != bounds.num_sums or not all(abs(value) <= _LARGEST_SUM for value in sums):  # false for a NaN, too
        labelled = f", and {', '.join(COUNTS)} of each label" if bounds.measures.labels else ""
        wanted = ", ".join(bounds.measures.bounds) + labelled
        found = f"its sums are {len(sums)} numbers, or one is not finite or beyond 2^40"
        raise ValueError(f"{found}: they should be {bounds.num_sums}: {wanted}")
    return list(sums)


def figures(
    sums: Sequence[Sequence[float]], bounds: Bounds, noise_multiplier: float, summed: int = 0
) -> dict[str, Any]:
    """The task's figures over all silos, with the standard errors due to the noise.

    Args:
        sums: the noised sums of each silo.
        bounds: as the silos used them.
        noise_multiplier: of the plan's release.
        summed: silos in the sums, where these are one row for all; 0: each has a row.

    Returns:
        As ``Measures.figures``.
    """
    total = np.reshape(sums, (len(sums), bounds.num_sums)).sum(axis=0)
    error = math.sqrt(summed or len(sums)) * noise_multiplier * bounds.sensitivity
    return bounds.measures.figures(total * bounds.scale, error)
