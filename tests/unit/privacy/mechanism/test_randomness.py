"""Sampling and noise: their distribution, their independence, and that a request repeats them exactly."""

import numpy as np
import pytest
import torch
from scipy import stats

from privacy.accounting.truncation import size_margin, size_noise
from privacy.mechanism.noise import grid, noised, standard_normal
from privacy.mechanism.sampler import poisson_sample, sample
from privacy.mechanism.streams import Streams
from privacy.plan import PlanTerms

PLAN = PlanTerms(
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
    total = stats.binomtest(int(inclusion.sum()), inclusion.size, PLAN.terms.sampling_rate)
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


CAP = 30
CAPPED = PlanTerms(
    sampler="truncated_poisson",
    sampling_rate=0.05,
    max_batch_size=CAP,
    max_units=600,
    max_grad_norm=2.0,
    noise_multiplier=0.8,
    rounds=1,
    steps_per_round=50,
    delta=1e-5,
).bind(300)


def test_truncated_batches_are_random_subsets_of_the_poisson_batches():
    steps, num_units = 2000, 450  # 22.5 expected; 5% of the batches are cut
    kept, drawn = np.zeros((steps, num_units)), np.zeros((steps, num_units))
    for step in range(steps):
        kept[step, sample(CAPPED, STREAMS, step, num_units)] = 1
        drawn[step, poisson_sample(CAPPED, STREAMS, step, num_units)] = 1
    assert (kept <= drawn).all()
    over = drawn.sum(axis=1) > CAP
    assert 0.02 < over.mean() < 0.1
    assert (kept[~over] == drawn[~over]).all()
    assert (kept[over].sum(axis=1) == CAP).all()
    # Which units lose their place does not depend on their position.
    lost = (drawn - kept)[over].sum(axis=0)
    expected = lost.mean() * np.ones(num_units)
    assert stats.chisquare(lost, expected).pvalue > 1e-3
    halves = lost.reshape(2, -1).sum(axis=1).astype(int)
    assert stats.binomtest(int(halves[0]), int(halves.sum())).pvalue > 1e-3


def test_a_dataset_too_large_for_the_plan_trains_on_empty_batches():
    limit = CAPPED.terms.max_units - size_margin(1, 1e-5)
    for seed in range(20):
        streams = Streams(bytes([seed] * 32), DIGEST)
        small, large = limit - 4 * size_noise(1), CAPPED.terms.max_units + 1
        assert any(len(sample(CAPPED, streams, step, int(small))) for step in range(50))
        assert not any(len(sample(CAPPED, streams, step, large)) for step in range(50))


def test_the_size_test_is_noisy_and_one_for_all_steps_of_a_charge():
    limit = CAPPED.terms.max_units - size_margin(1, 1e-5)
    passed = []
    for seed in range(400):
        streams = Streams(seed.to_bytes(32, "little"), DIGEST)
        found = {
            sum(len(sample(CAPPED, streams, step, limit)) for step in steps) > 0 for steps in (range(9), range(9, 18))
        }
        assert len(found) == 1
        passed.append(found.pop())
    assert stats.binomtest(sum(passed), len(passed)).pvalue > 1e-3  # at the limit itself a coin
    assert sum(passed[:50]) not in (0, 50)


def noise(step=0, name="w", streams=STREAMS, size=200_000):
    return noised(torch.zeros(size), PLAN.noise_std, streams, step, name)


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


def test_noise_over_many_blocks_is_the_same_on_any_number_of_threads():
    before = torch.get_num_threads()
    values = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            values.append(noise(size=300_001))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])


def test_the_blocks_of_a_large_parameter_and_neighbours_are_unrelated():
    values = noise(size=2**18).double().numpy()
    blocks = values.reshape(4, -1)
    correlation = np.corrcoef(blocks) - np.eye(4)
    assert np.abs(correlation).max() < 5 / np.sqrt(2**16)
    for lag in (1, 2, 2**13):
        assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 5 / np.sqrt(2**18)
    assert stats.kstest(values / 1.6, "norm").pvalue > 1e-3


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5, 7), (257, 256)])
def test_the_noised_sum_keeps_its_shape_and_adds_the_sum(shape):
    clipped = torch.full(shape, 100.0)
    released = noised(clipped, PLAN.noise_std, STREAMS, 0, "w")
    assert (released.shape, released.dtype) == (clipped.shape, torch.float32)
    torch.testing.assert_close(
        released - noised(torch.zeros(shape), PLAN.noise_std, STREAMS, 0, "w"), clipped, atol=1e-4, rtol=0
    )
    assert torch.equal(clipped, torch.full(shape, 100.0))  # the sum itself is left alone


def test_a_value_is_the_sum_of_four_draws():
    generator, again = (STREAMS.generator("noise", 0, "w") for _ in range(2))
    four = np.stack([again.standard_normal(1000) for _ in range(4)])
    np.testing.assert_allclose(standard_normal(generator, 1000), four.sum(axis=0) / 2, rtol=1e-12)


def test_the_noised_sum_lies_on_a_public_grid():
    spacing = grid(PLAN.noise_std)
    assert spacing == 2.0**-20
    value = noised(torch.linspace(-3, 3, 5000), PLAN.noise_std, STREAMS, 0, "w").double() / spacing
    assert torch.equal(value, value.round())


def test_a_seed_has_32_bytes():
    with pytest.raises(ValueError, match="32 bytes"):
        Streams(b"short", DIGEST)
