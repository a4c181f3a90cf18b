"""The plan: one frozen object that ties together everything a guarantee depends on.

Sampler, clipping norm, noise and the accountant's event are all read from the plan, so that they cannot disagree.
What only changes speed (micro-batch size, threads) is not in here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from configs.errors import PolicyRefusal
from configs.storage.files import digest_json
from privacy.accounting.schedule import Schedule
from privacy.accounting.truncation import Truncation, size_margin, size_noise
from privacy.compression import Compression, compression_problem
from privacy.metric_release import Finite, MetricRelease, Rounds
from privacy.secure_sum import SecureSum

if TYPE_CHECKING:
    from privacy.accounting.accountant import Guarantee
    from privacy.distributed.distributed import DistributedNoise

METRIC = "held_out"

SMALLEST_DELTA, LARGEST_DELTA = 1e-100, 1e-5
SMALLEST_RATE = 2.0**-64  # below it the sampler's 64 bits never choose a unit, and accounting ends in floating point
_SINCE_VERSION_2 = {
    *("clipping_function", "target_quantile", "num_clients", "max_batch_size", "max_units"),
    *("metric_releases", "secure_sum", "compression"),
}
_FIXED_NORM = ("fixed", "automatic")
_WIDE = 1e4  # a noise multiplier beside which words have room for any sum that they have room for at all
_COUNT_NOISE_SHARE = 1 / 20  # of the expected batch (Andrew et al. 2021)
Size = Annotated[int, Field(ge=0, le=10**12)]


class PlanTerms(BaseModel):
    """What a coordinator may ask of every silo: public fields only, the same for all.

    Attributes:
        version: 2; plans of version 1 are read and accounted as they were.
        unit: what is protected: a ``record`` of a silo, or a whole ``client``.
        relation: neighbouring datasets differ by adding or removing one record; by zeroing out one client.
        sampler: ``poisson``: each unit is in a step's batch independently with ``sampling_rate``;
            ``truncated_poisson``: the same, but of more than ``max_batch_size`` units a random subset of that size is
            kept; ``all``: every client is in every round, present or not.
        sampling_rate: probability q.
        max_grad_norm: norm C to which a record's gradient, over all trainable parameters together, or a client's update
            is clipped; with ``quantile`` clipping the norm that a round starts with.
        clipping_function: ``fixed`` shortens what is longer than C; ``automatic`` brings every gradient to just below C
            (Bu et al. 2022); ``quantile`` moves C after each step to where ``target_quantile`` of the norms are below
            (Andrew et al. 2021), by a noised count that is released with the sum and takes its share of sigma.
        target_quantile: share of a batch's gradients that are not shortened; 0 without ``quantile``.
        noise_multiplier: sigma; the noise on the SUM of clipped vectors has standard deviation sigma * C.
        rounds: rounds of the whole run.
        steps_per_round: noised sums of a round: a silo's optimizer steps (empty batches are steps); 1 for clients.
        delta: delta of the whole run.
        num_clients: the constant that divides the sum of clients' updates; 0 for records.
        max_batch_size: cap of truncated Poisson sampling; 0 without.
        max_units: most units of a dataset under truncated Poisson sampling, the size in its event; 0 without.
        metric_releases: everything else that is released from the same units.
        secure_sum: how updates are added up under masks; None: each is seen as it is.
        compression: how updates become few bytes; None: they travel as arrays.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1, 2] = 2
    unit: Literal["record", "client"] = "record"
    relation: Literal["add_or_remove_one", "zero_out"] = "add_or_remove_one"
    sampler: Literal["poisson", "truncated_poisson", "all"] = "poisson"
    sampling_rate: Annotated[float, Field(ge=SMALLEST_RATE, le=1)]
    max_grad_norm: Finite
    clipping_function: Literal["fixed", "automatic", "quantile"] = "fixed"
    target_quantile: Annotated[float, Field(ge=0, lt=1)] = 0.0
    noise_multiplier: Finite
    rounds: Rounds
    steps_per_round: Rounds
    delta: Annotated[float, Field(ge=SMALLEST_DELTA, le=LARGEST_DELTA)]
    num_clients: Size = 0
    max_batch_size: Size = 0
    max_units: Size = 0
    metric_releases: Annotated[tuple[MetricRelease, ...], Field(max_length=20)] = ()
    secure_sum: SecureSum | None = None
    compression: Compression | None = None

    @model_validator(mode="after")
    def _consistent(self) -> PlanTerms:
        of_terms = (self._version_problem(), self._unit_problem(), self._sampler_problem(), self._clipping_problem())
        of_updates = (self._noise_problem(), compression_problem(self.compression, self.unit, self.secure_sum))
        for problem in (*of_terms, self._metric_problem(), *of_updates):
            if problem:
                raise ValueError(problem)
        return self

    def _version_problem(self) -> str:
        later = {name: getattr(self, name) for name in ("metric_releases", "secure_sum", "compression")}
        shown = (self.unit, self.sampler, self.clipping_function)
        if self.version == 1 and (shown != ("record", "poisson", "fixed") or any(later.values())):
            return (
                "version is 1: its plans have unit 'record', sampler 'poisson', clipping_function 'fixed', and no "
                f"{', '.join(later)}; give 2"
            )
        return ""

    def _unit_problem(self) -> str:
        """Records are sampled and added or removed; clients are all there in every round and zeroed out."""
        if self.unit == "record":
            fixed: dict[str, Any] = {"relation": "add_or_remove_one", "num_clients": 0}
            if self.sampler == "all" or self.sampling_rate == 1:
                return (
                    f"sampler is {self.sampler!r} at sampling_rate {self.sampling_rate:g}: with unit 'record' give "
                    "'poisson' or 'truncated_poisson' and a sampling_rate below 1"
                )
        else:
            fixed = {"relation": "zero_out", "sampler": "all", "steps_per_round": 1}
            if self.sampling_rate != 1:
                return (
                    f"sampling_rate is {self.sampling_rate:g}: who takes part is not secret, and so sampling clients "
                    "amplifies nothing; with unit 'client' give 1"
                )
            if not 1 <= self.num_clients <= 0.1 / self.delta:
                return f"num_clients is {self.num_clients}: with delta {self.delta:g} give 1 to {0.1 / self.delta:.6g}"
        wrong = next((name for name, value in fixed.items() if getattr(self, name) != value), "")
        if wrong:
            return f"{wrong} is {getattr(self, wrong)!r}: with unit {self.unit!r} give {fixed[wrong]!r}"
        return ""

    def _sampler_problem(self) -> str:
        cap, units = self.max_batch_size, self.max_units
        if self.sampler != "truncated_poisson":
            if cap or units:
                return f"max_batch_size is {cap} and max_units {units}: give 0 for both, or sampler 'truncated_poisson'"
            return ""
        if not cap or not units:
            return (
                f"max_batch_size is {cap} and max_units {units}: sampler 'truncated_poisson' needs both; give them, or "
                "sampler 'poisson'"
            )
        if cap < self.sampling_rate * units:
            return (
                f"max_batch_size is {cap}: below the expected batch of {self.sampling_rate * units:g} (sampling_rate "
                "times max_units); raise it, or lower sampling_rate"
            )
        return ""

    def _clipping_problem(self) -> str:
        if (self.clipping_function == "quantile") != (self.target_quantile > 0):
            return (
                f"target_quantile is {self.target_quantile:g} with clipping_function {self.clipping_function!r}: "
                "give one above 0 with 'quantile', and 0 with the others"
            )
        if self.clipping_function == "quantile" and self.unit == "client":
            return "clipping_function is 'quantile': it is for unit 'record'; give 'fixed' or 'automatic'"
        return ""

    def _metric_problem(self) -> str:
        names = [metric.name for metric in self.metric_releases]
        if len(set(names)) < len(names):
            return f"metric_releases has the names {', '.join(names)}: give each its own"
        return ""

    def _noise_problem(self) -> str:
        """A step over all silos' Poisson samples is all that shared noise is proven for."""
        if self.secure_sum is None or self.secure_sum.noise is None:
            return ""
        for name, fits in (("steps_per_round", (1,)), ("sampler", ("poisson",)), ("clipping_function", _FIXED_NORM)):
            if getattr(self, name) not in fits:
                return f"{name} is {getattr(self, name)!r}: with secure_sum.noise give {' or '.join(map(str, fits))}"
        from privacy.distributed.planned import problem_of

        return problem_of(self.secure_sum, self.noise_multiplier, self.max_grad_norm)

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A plan of before is written as it was, so that its digest stays."""
        tree: dict[str, Any] = handler(self)
        without = {name for name in ("secure_sum", "compression") if getattr(self, name) is None}
        without |= _SINCE_VERSION_2 if self.version == 1 else set()
        return {name: value for name, value in tree.items() if name not in without}

    @property
    def steps(self) -> int:
        """Noised sums of the whole run."""
        return self.rounds * self.steps_per_round

    @property
    def digest(self) -> str:
        """Digest of all fields."""
        return digest_json(self.model_dump())

    @property
    def schedule(self) -> Schedule:
        """Everything the run will release, for the accountant."""
        releases = [(metric.noise_multiplier, metric.releases) for metric in self.metric_releases]
        truncation = None
        if self.sampler == "truncated_poisson":
            truncation = Truncation(self.max_units, self.max_batch_size)
            releases.append((size_noise(self.rounds), self.rounds))
        from privacy.distributed.guarantee import as_gaussian

        told = (self.steps, self.sampling_rate, self.noise_multiplier, truncation, tuple(releases))
        return as_gaussian(Schedule(*told, fixed_bins=self.version == 1), self.delta, self.noise)

    @property
    def noise(self) -> DistributedNoise | None:
        """What the silos of a sum add together in a step; None where whoever adds noise adds all of it."""
        from privacy.distributed.planned import planned

        return planned(self.secure_sum, self.noise_multiplier, self.max_grad_norm)

    def event(self) -> Any:
        """The whole schedule as a dp_accounting ``DpEvent``, for any accountant."""
        return self.schedule.event()

    @property
    def epsilon(self) -> float:
        """What the whole schedule spends: the number that is reserved and claimed."""
        from privacy.distributed.guarantee import spent

        return spent(self.schedule, self.delta, self.noise)

    def guarantee(self) -> Guarantee:
        """The whole schedule's guarantee, with the other accountants' epsilons for comparison; slower."""
        from privacy.distributed.guarantee import guarantee_of

        return guarantee_of(self.schedule, self.delta, self.noise)

    def calibrated(self, epsilon: float) -> PlanTerms:
        """The same plan with the smallest noise multiplier whose whole schedule spends at most epsilon.

        Raises:
            InputError: no noise multiplier is enough.
        """
        from privacy.distributed.guarantee import multiplier

        wide = self.model_copy(update={"noise_multiplier": _WIDE})
        sigma = multiplier(epsilon, wide.schedule, self.delta, wide.noise)
        return self.model_copy(update={"noise_multiplier": sigma})

    def passes_size_test(self, noised_size: float) -> bool:
        """Whether a round of truncated sampling may use the dataset whose noised size this is."""
        return noised_size <= self.max_units - size_margin(self.rounds, self.delta)

    def bind(self, public_record_count: int) -> PrivacyPlan:
        """Binds the terms to a silo's declared size.

        Raises:
            PolicyRefusal: delta is above 0.1 / public_record_count, the plan is not about records, or it is for smaller
                datasets.
        """
        if self.unit != "record":
            raise _refusal("unit", self.unit, "record", "silos train with records as units")
        if self.sampler == "truncated_poisson" and not self.passes_size_test(public_record_count):
            least = public_record_count + size_margin(self.rounds, self.delta)
            why = f"a dataset with public_record_count {public_record_count} is too large for this plan"
            raise _refusal("max_units", f"{self.max_units}", f"at least {least}", why)
        allowed = min(LARGEST_DELTA, 0.1 / public_record_count)
        if self.delta > allowed:
            why = f"a dataset with public_record_count {public_record_count} allows at most {allowed:.3g}"
            raise _refusal("delta", f"{self.delta:g}", f"{allowed:.3g}", f"{why}; lower privacy.delta")
        plan = PrivacyPlan(terms=self, public_record_count=public_record_count)
        if self.clipping_function == "quantile" and 2 * plan.count_noise_std <= self.noise_multiplier:
            enough = 10 * self.noise_multiplier
            why = f"the noised count would use up the whole noise; expected batches above {enough:.4g} leave some"
            raise _refusal("clipping_function", "quantile", "fixed or automatic", why)
        return plan

    def for_clients(self) -> PrivacyPlan:
        """Binds the terms for the aggregator, with clients as units: the size is their public number.

        Raises:
            PolicyRefusal: the plan is about records, or asks for what no aggregator does.
        """
        if self.unit != "client":
            raise _refusal("unit", self.unit, "client", "an aggregator adds noise to clients' updates")
        if self.clipping_function != "fixed":
            raise _refusal("clipping_function", self.clipping_function, "fixed", "a client's update is shortened to C")
        if self.metric_releases:
            names = ", ".join(metric.name for metric in self.metric_releases)
            raise _refusal("metric_releases", names, "none", "metrics are sums over records")
        return PrivacyPlan(terms=self, public_record_count=self.num_clients)


def _refusal(rule: str, asked: str, allowed: str, why: str) -> PolicyRefusal:
    return PolicyRefusal(f"{rule} is {asked}: {why}", rule=rule, asked=asked, allowed=allowed)


class PrivacyPlan(BaseModel):
    """Terms bound to a silo's declared size, or to the number of clients; never to a size computed from data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    terms: PlanTerms
    public_record_count: Annotated[int, Field(ge=1)]

    @property
    def expected_batch_size(self) -> float:
        """The normaliser of every step: q times the public count, whatever the batch turned out to be."""
        return self.terms.sampling_rate * self.public_record_count

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on the sum of gradients that are clipped to ``max_grad_norm``.

        With ``quantile`` the sum and the count, each over its own noise, are one Gaussian release: what the count takes
        is made up for here, so that both together have noise multiplier sigma (Andrew et al. 2021, theorem 1).
        """
        multiplier: float = self.terms.noise_multiplier
        if self.terms.clipping_function == "quantile":
            multiplier = 1 / math.sqrt(multiplier**-2 - (2 * self.count_noise_std) ** -2)
        return multiplier * self.terms.max_grad_norm

    @property
    def count_noise_std(self) -> float:
        """Standard deviation of the noise on the count of gradients below the clipping norm, each 1/2 or -1/2."""
        return self.expected_batch_size * _COUNT_NOISE_SHARE

    @property
    def inclusion_threshold(self) -> int:
        """A unit is sampled when a uniform 64-bit integer is below floor(q * 2^64): never more often than q."""
        return math.floor(self.terms.sampling_rate * 2**64)
