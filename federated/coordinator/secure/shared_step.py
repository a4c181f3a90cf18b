"""The step of a round whose noise the silos make together: over all silos' samples, from their noised sum."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from configs.errors import InputError
from federated.adapters.arrays import Arrays
from federated.aggregation.secure_sum import arrays_of, vector
from privacy.distributed.distributed import DistributedNoise
from privacy.plan import PlanTerms
from privacy.secagg.encoding import Words


@dataclass(frozen=True)
class SharedStep:
    """A plain step, whose gradient is a sum over the records that all silos have sampled.

    Attributes:
        noise: of the sum.
        sampling_rate: of each record, at each silo.
        learning_rate: of the step.
    """

    noise: DistributedNoise
    sampling_rate: float
    learning_rate: float

    def update(self, words: Words, summed: Mapping[str, int], added: Arrays, like: Arrays) -> Arrays:
        """What the step adds to the weights, before a server optimizer makes more of it.

        Args:
            words: the sum.
            summed: public counts of the silos that are in it. They give the batch that is expected, whatever it was.
            added: what every step of the round adds to its gradient; empty: nothing.
            like: arrays with the shapes of what trains.
        """
        gradient = self.noise.decode(words) / self._batch(summed)
        if added:
            gradient += vector(added, inf)
        return arrays_of(-self.learning_rate * gradient, like)

    def told(self, summed: Mapping[str, int]) -> dict[str, float]:
        """What public numbers say of the update: its noise, and the most that rounding moves a value by."""
        scale = self.learning_rate / self._batch(summed)
        silos = len(summed)
        return {
            "error_bound": self.noise.rounding_bound(silos) * scale,
            "noise_std": self.noise.noise_std(silos) * scale,
        }

    def _batch(self, summed: Mapping[str, int]) -> float:
        return self.sampling_rate * sum(summed.values())


def check_room(plan: PlanTerms, counts: Mapping[str, int]) -> None:
    """Refuses silos whose sums would be shortened most of the time, before anything is reserved.

    Raises:
        InputError: a silo's expected batch is longer than the plan's sums.
    """
    if (noise := plan.noise) is None:
        return
    large = sorted(silo for silo, count in counts.items() if plan.sampling_rate * count * noise.clip > noise.reach)
    if large:
        raise InputError(
            f"data.private.public_record_count: silo {large[0]!r} has declared {counts[large[0]]} records, and the "
            "plan has room for the sums of smaller ones; give the largest silo's count"
        )


def check_values(plan: PlanTerms, length: int) -> None:
    """Refuses more values than rounding is charged for.

    Raises:
        InputError: there are more.
    """
    if plan.noise is not None and length > plan.noise.dimension:
        raise InputError(
            f"privacy.mode is 'distributed' and {length} values train: rounding is charged for {plan.noise.dimension} "
            "at most; train fewer (federated.train, federated.lora_rank), or give privacy.mode = 'single'"
        )
