"""The plan: one frozen object that ties together everything a guarantee depends on.

Sampler, clipping norm, noise and the accountant's event are all read from the plan, so that they cannot disagree.
What only changes speed (micro-batch size, threads) is not in here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from configs.artifacts import digest_json
from configs.errors import PolicyRefusal

if TYPE_CHECKING:
    from privacy.accountant import Guarantee

LARGEST_DELTA = 1e-5
Finite = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class PlanRequest(BaseModel):
    """What a coordinator may ask of every silo: public fields only, the same for all.

    Attributes:
        unit: what is protected.
        relation: neighbouring datasets differ by adding or removing one unit.
        sampler: each unit is in a step's batch independently with ``sampling_rate``.
        sampling_rate: probability q.
        max_grad_norm: clipping norm C of one unit's gradient over all trainable parameters together.
        noise_multiplier: sigma; the noise on the SUM of clipped gradients has standard deviation sigma * C.
        rounds: rounds of the whole run.
        steps_per_round: optimizer steps of a silo in a round; empty batches are steps.
        delta: delta of the whole run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    unit: Literal["record"] = "record"
    relation: Literal["add_or_remove_one"] = "add_or_remove_one"
    sampler: Literal["poisson"] = "poisson"
    sampling_rate: Annotated[float, Field(gt=0, lt=1)]
    max_grad_norm: Finite
    noise_multiplier: Finite
    rounds: Annotated[int, Field(ge=1, le=100_000)]
    steps_per_round: Annotated[int, Field(ge=1, le=100_000)]
    delta: Annotated[float, Field(gt=0, le=LARGEST_DELTA)]

    @property
    def steps(self) -> int:
        """Steps of the whole schedule."""
        return self.rounds * self.steps_per_round

    @property
    def digest(self) -> str:
        """Digest of all fields."""
        return digest_json(self.model_dump())

    @property
    def epsilon(self) -> float:
        """What the whole schedule spends: the number that is reserved and claimed."""
        from privacy.accountant import pld_epsilon

        return pld_epsilon(self.sampling_rate, self.noise_multiplier, self.steps, self.delta)

    def guarantee(self) -> Guarantee:
        """The same with the other accountants beside it; slower."""
        from privacy.accountant import dp_sgd_guarantee

        return dp_sgd_guarantee(self.sampling_rate, self.noise_multiplier, self.steps, self.delta)

    def bind(self, public_record_count: int) -> PrivacyPlan:
        """A silo's own plan.

        Raises:
            PolicyRefusal: delta is above 0.1 / public_record_count.
        """
        allowed = min(LARGEST_DELTA, 0.1 / public_record_count)
        if self.delta > allowed:
            raise PolicyRefusal(
                f"delta is {self.delta:g}: a dataset with public_record_count {public_record_count} allows at most "
                f"{allowed:.3g}; lower privacy.delta",
                rule="delta",
                asked=f"{self.delta:g}",
                allowed=f"{allowed:.3g}",
            )
        return PrivacyPlan(request=self, public_record_count=public_record_count)


class PrivacyPlan(BaseModel):
    """A request bound to one silo's declared size. The size is never computed from the data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    request: PlanRequest
    public_record_count: Annotated[int, Field(ge=1)]

    @property
    def expected_batch_size(self) -> float:
        """The normaliser of every step: q times the public count, whatever the batch turned out to be."""
        return self.request.sampling_rate * self.public_record_count

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on the sum of clipped gradients."""
        return self.request.noise_multiplier * self.request.max_grad_norm

    @property
    def inclusion_threshold(self) -> int:
        """A unit is sampled when a uniform 64-bit integer is below floor(q * 2^64): never more often than q."""
        return math.floor(self.request.sampling_rate * 2**64)
