"""Poisson sampling: every unit is in a step's batch independently. An empty batch is a step like any other."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from privacy.accounting.truncation import size_noise
from privacy.mechanism.noise import standard_normal
from privacy.mechanism.streams import Streams
from privacy.plan import PrivacyPlan

Indices = npt.NDArray[np.int64]
Example = TypeVar("Example")


def sample(plan: PrivacyPlan, streams: Streams, step: int, num_units: int) -> Indices:
    """Indices of the units in this step's batch, ascending, by the plan's sampler.

    Args:
        plan: gives sampler, sampling rate and cap.
        streams: the charge's random streams.
        step: step within the charge.
        num_units: units that exist; used to draw for each of them, never as a size in the guarantee.
    """
    request = plan.terms
    if request.sampler == "truncated_poisson":
        if not _passes_size_test(plan, streams, num_units):
            num_units = 0
        return _truncated(poisson_sample(plan, streams, step, num_units), request.max_batch_size, streams, step)
    return poisson_sample(plan, streams, step, num_units)


def poisson_sample(plan: PrivacyPlan, streams: Streams, step: int, num_units: int) -> Indices:
    """Indices of the units that are drawn, each independently with the sampling rate."""
    draws = streams.generator("sample", step).integers(2**64, size=num_units, dtype=np.uint64)
    return np.flatnonzero(draws < np.uint64(plan.inclusion_threshold)).astype(np.int64)


def one_example_each(
    streams: Streams,
    step: int,
    units: Sequence[Sequence[Example]],
    chosen: Iterable[int],
    augment: Callable[[Example, np.random.Generator], Example] | None = None,
) -> list[Example]:
    """One example of each chosen unit, uniformly at random, by the charge's own stream.

    A unit's draw depends on that unit's place alone, so what a step takes of one unit depends on no other one. A unit
    without examples adds nothing.

    Args:
        streams: the charge's random streams.
        step: step within the charge.
        units: the examples of each.
        chosen: places of the units.
        augment: changes an example by a stream that is this unit's and this step's alone: what a unit draws, and how
            much, moves no other one's draws. None: nothing is changed, and nothing drawn.
    """
    places = list(chosen)
    # A generator's draws are the same however many are asked for: those beyond the last chosen unit are left out.
    draws = streams.generator("example", step).integers(2**64, size=max(places, default=-1) + 1, dtype=np.uint64)
    found = [(place, units[place]) for place in places]
    taken = [(place, examples[int(draws[place]) * len(examples) >> 64]) for place, examples in found if examples]
    if augment is None:
        return [example for _, example in taken]
    return [augment(example, streams.generator("augment", step, f"{place}")) for place, example in taken]


def _truncated(drawn: Indices, max_batch_size: int, streams: Streams, step: int) -> Indices:
    """The drawn units, or a uniformly random subset of the largest size allowed."""
    if len(drawn) <= max_batch_size:
        return drawn
    kept = streams.generator("truncate", step).choice(drawn, size=max_batch_size, replace=False, shuffle=False)
    return np.sort(kept)


def _passes_size_test(plan: PrivacyPlan, streams: Streams, num_units: int) -> bool:
    """One noised look at the size for all steps of a charge; its only use is to leave batches empty."""
    noise = float(standard_normal(streams.generator("size", 0), 1)[0]) * size_noise(plan.terms.rounds)
    return plan.terms.passes_size_test(num_units + noise)
