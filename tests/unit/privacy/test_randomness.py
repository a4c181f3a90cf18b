"""Sampling and noise: their distribution, their independence, and that a request repeats them exactly."""

import numpy as np
import pytest
import torch
from scipy import stats

from privacy.noise import grid, noised
from privacy.plan import PlanRequest
from privacy.sampler import poisson_sample
from privacy.streams import Streams

PLAN = PlanRequest(
    sampling_rate=0.05, max_grad_norm=2.0, noise_multiplier=0.8, rounds=4, steps_per_round=50, delta=1e-5
).bind(1000)
DIGEST, OTHER = "11" * 32, "22" * 32
STREAMS = Streams(bytes(range(32)), DIGEST)


def samples(num_units=400, steps=2000):
    inclusion = np.zeros((steps, num_units), dtype=bool)
    for step in range(steps):
        inclusion[step, poisson_sample(PLAN, STREAMS, step, num_units)] = True
    return inclusion


def test_inclusion_is_binomial_and_pairwise_independent():
    inclusion = samples()
    total = stats.binomtest(int(inclusion.sum()), inclusion.size, PLAN.request.sampling_rate)
    assert total.pvalue > 1e-3
    # Batch sizes have the binomial's variance: a sampler of fixed size or a shuffle would not.
    sizes = inclusion.sum(axis=1)
    assert sizes.var() == pytest.approx(400 * 0.05 * 0.95, rel=0.15)
    correlation = np.corrcoef(inclusion[:, :60].T) - np.eye(60)
    assert np.abs(correlation).max() < 5 / np.sqrt(len(inclusion))


def test_a_units_presence_does_not_depend_on_the_others():
    few, many = (set(poisson_sample(PLAN, STREAMS, 3, n).tolist()) for n in (300, 400))
    assert few == {index for index in many if index < 300}


def test_empty_batches_happen_and_are_batches():
    sizes = [len(poisson_sample(PLAN, STREAMS, step, 20)) for step in range(200)]
    assert 0 in sizes
    assert max(sizes) > 1


def noise(step=0, name="w", streams=STREAMS, size=200_000):
    return noised(torch.zeros(size), PLAN, streams, step, name)


def test_noise_has_the_plans_standard_deviation_and_is_normal():
    values = noise().double()
    assert values.std().item() == pytest.approx(1.6, rel=0.01)
    assert abs(values.mean().item()) < 5 * 1.6 / np.sqrt(len(values))
    assert stats.kstest(values.numpy() / 1.6, "norm").pvalue > 1e-3


@pytest.mark.parametrize(
    "other",
    [
        {"step": 1},
        {"name": "v"},
        {"streams": Streams(bytes(range(32)), OTHER)},
        {"streams": Streams(bytes(32), DIGEST)},
    ],
)
def test_another_step_parameter_request_or_seed_has_unrelated_noise(other):
    correlation = np.corrcoef(noise().numpy(), noise(**other).numpy())[0, 1]
    assert abs(correlation) < 5 / np.sqrt(200_000)


def test_the_same_request_repeats_its_noise_bit_for_bit():
    again = Streams(bytes(range(32)), DIGEST)
    assert torch.equal(noise(), noise(streams=again))


def test_the_noised_sum_lies_on_a_public_grid():
    spacing = grid(PLAN.noise_std)
    assert spacing == 2.0**-20
    value = noised(torch.linspace(-3, 3, 5000), PLAN, STREAMS, 0, "w").double() / spacing
    assert torch.equal(value, value.round())


def test_a_seed_has_32_bytes():
    with pytest.raises(ValueError, match="32 bytes"):
        Streams(b"short", DIGEST)
