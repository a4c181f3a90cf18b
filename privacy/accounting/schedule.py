"""What a run will release, fixed beforehand, and its privacy-loss distribution."""

import math
from dataclasses import dataclass, replace
from typing import Any

from configs.imports import import_large
from privacy.accounting.truncation import FAILURE_SHARE, Truncation

_BINS_PER_DEVIATION = 12
_WIDEST, _NARROWEST = 1e-3, 1e-7
_MOST_BINS = 2**22
AT_ONCE = 10_000
_HOPELESS = 5e3  # nats


@dataclass(frozen=True)
class Schedule:
    """Everything a run will release.

    Attributes:
        steps: noised sums, each over a fresh sample of the units.
        sampling_rate: q; 1 means that every unit is in every step.
        noise_multiplier: sigma of a step.
        truncation: the cap on batches, where there is one.
        releases: Gaussian releases beside the steps: (noise multiplier, number of releases) of each.
        fixed_bins: the width of bins that plans of version 1 were accounted with.
    """

    steps: int
    sampling_rate: float
    noise_multiplier: float
    truncation: Truncation | None = None
    releases: tuple[tuple[float, int], ...] = ()
    fixed_bins: bool = False

    def event(self) -> Any:
        """The schedule as a dp_accounting ``DpEvent``, which any of its accountants can take."""
        import dp_accounting as dp

        step: Any = dp.GaussianDpEvent(self.noise_multiplier)
        if self.truncation is not None:
            step = dp.TruncatedSubsampledGaussianDpEvent(
                dataset_size=self.truncation.max_units,
                sampling_probability=self.sampling_rate,
                truncated_batch_size=self.truncation.max_batch_size,
                noise_multiplier=self.noise_multiplier,
            )
        elif self.sampling_rate < 1:
            step = dp.PoissonSampledDpEvent(self.sampling_rate, step)
        beside = [dp.SelfComposedDpEvent(dp.GaussianDpEvent(sigma), count) for sigma, count in self.releases]
        return dp.ComposedDpEvent([dp.SelfComposedDpEvent(step, self.steps), *beside])

    def accounted_delta(self, delta: float) -> float:
        """The part of delta that composition may use; under truncation the test of the size may fail with the rest."""
        return delta if self.truncation is None else delta * (1 - FAILURE_SHARE)

    def with_noise(self, noise_multiplier: float) -> "Schedule":
        """The same with another sigma in the steps."""
        return replace(self, noise_multiplier=noise_multiplier)

    def pld(self, *, pessimistic: bool, width: float) -> Any:
        """The privacy-loss distribution under add-or-remove-one (for q = 1 that of a zero-out, too).

        Args:
            pessimistic: an upper bound; otherwise dp-accounting's lower estimate.
            width: of the privacy loss' bins; smaller is tighter and slower. Every width gives an upper bound.
        """
        if self.sampling_rate == 1:
            steps = ((self.noise_multiplier, self.steps), *self.releases)
            return _gaussian(_composed(steps), pessimistic, width)
        composed = _self_composed(self._step(pessimistic, width), self.steps)
        if self.releases:
            composed = composed.compose(_gaussian(_composed(self.releases), pessimistic, width))
        return composed

    def _step(self, pessimistic: bool, width: float) -> Any:
        poisson = _gaussian(self.noise_multiplier, pessimistic, width, sampling_prob=self.sampling_rate)
        displaced = self.truncation.displacement_probability(self.sampling_rate) if self.truncation else 0.0
        if displaced == 0:
            return poisson
        import dp_accounting as dp

        # With fewer than a full batch of others a unit adds itself: a Poisson step. With a full batch it takes the
        # place of another: twice the sensitivity, at a rate never above q. The second case is the worse one, and is
        # likelier with more units; so this holds for every dataset of up to max_units units, while dp-accounting's own
        # event, which takes the exact rate, holds for one size (arXiv:2508.15089).
        swap = _gaussian(
            self.noise_multiplier / 2,
            pessimistic,
            width,
            sampling_prob=self.sampling_rate,
            neighboring_relation=dp.NeighboringRelation.REPLACE_ONE,
        )
        return swap.compute_mixture(poisson, displaced)

    def width(self) -> float:
        """Width of bins that costs less than a part in a thousand of epsilon.

        Connecting the dots adds at most width^2/4 per step to the variance of the privacy loss. A width of a twelfth of
        the loss' deviation adds two parts in a thousand to the variance, and half of that to epsilon. The width is a
        power of two, so that schedules that differ little have the same.
        """
        if self.fixed_bins:
            return min(1e-3, max(1e-4, 0.1 / self.steps))
        beside = _composed(self.releases) ** -2 if self.releases else 0.0
        variance = min(self._chi_square, self.noise_multiplier**-2) + beside / self.steps
        best = min(_WIDEST, max(_NARROWEST, math.sqrt(variance) / _BINS_PER_DEVIATION))
        span = 2 * self.loss_bound + 20 * math.sqrt(self.steps * variance)
        return float(2.0 ** math.floor(math.log2(max(best, span / _MOST_BINS))))

    @property
    def _chi_square(self) -> float:
        """Chi-square of one step with a unit from one without it: bounds the loss' variance and, by log1p, its mean."""
        return float(self.sampling_rate**2 * math.expm1(min(self.noise_multiplier**-2, 500.0)))

    def rarely_in(self, delta: float) -> bool:
        """Whether a unit is in any batch at all with half of delta at most: then epsilon is 0, whatever the noise.

        The batches of a unit that is in none are those of a dataset without it, truncated or not. Half of delta, since
        an accountant's upper bound has come to 0 there, too: what it has told of a schedule before still holds.
        """
        return not self.releases and 2 * self.steps * self.sampling_rate <= self.accounted_delta(delta)

    @property
    def hopeless(self) -> bool:
        """Whether the loss is so large that its distribution is not built: infinity is an upper bound, too."""
        return self.loss_bound > _HOPELESS

    @property
    def loss_bound(self) -> float:
        """An upper bound on the steps' expected privacy loss, in nats."""
        a_step = min(math.log1p(self._chi_square), self.sampling_rate * self.noise_multiplier**-2 / 2)
        return self.steps * a_step


def _composed(releases: tuple[tuple[float, int], ...]) -> float:
    """Noise multiplier of the one Gaussian release that these compose into, exactly."""
    return float(sum(count / sigma**2 for sigma, count in releases) ** -0.5)


def _self_composed(pld: Any, times: int) -> Any:
    """Composes very many steps in stages, since dp-accounting's bound on the tails is poor for a single one."""
    if times <= AT_ONCE:
        return pld.self_compose(times)
    goes, rest = divmod(times, AT_ONCE)
    composed = _self_composed(pld.self_compose(AT_ONCE), goes)
    return composed.compose(pld.self_compose(rest)) if rest else composed


def _gaussian(sigma: float, pessimistic: bool, width: float, **options: Any) -> Any:
    import_large("dp_accounting.pld.privacy_loss_distribution")
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        sigma,
        pessimistic_estimate=pessimistic,
        value_discretization_interval=width,
        use_connect_dots=pessimistic,  # the tighter construction has no lower estimate
        **options,
    )
