"""Clients' updates as words, and the release of their sum: against exact arithmetic, and with a client that lies."""

from fractions import Fraction

import numpy as np
import pytest
from client_plans import client_plan

from privacy.mechanism.client_sum import ClippedSum
from privacy.mechanism.masked_clients import client_encoding, client_words, noised_client_mean
from privacy.mechanism.streams import Streams

C = 0.37
PLAN = client_plan(max_grad_norm=C, noise_multiplier=1.3, rounds=2, num_clients=7).for_clients()
STREAMS = Streams(bytes(range(32)), "ab" * 32)
MODULUS = 2**32


def updates(seed, silos=5, scale=1.0):
    drawn = np.random.default_rng(seed)
    return [
        {"b": drawn.normal(0, scale, (6, 3)).astype(np.float32), "a": drawn.normal(0, scale, 11).astype(np.float32)}
        for _ in range(silos)
    ]


def step_of(encoding):
    return Fraction(encoding.clip) / encoding.largest


def steps(mean, plan, encoding):
    """What was released, as the whole number of steps that it was before it was divided."""
    found = [Fraction(value) * plan.terms.num_clients / step_of(encoding) for value in mean.tolist()]
    whole = [round(value) for value in found]
    assert all(abs(value - one) < Fraction(1, 2**10) for value, one in zip(found, whole, strict=True))
    return np.array(whole, dtype=object)


@pytest.mark.parametrize("silos", [2, 3, 7, 20, 1000])
@pytest.mark.parametrize("multiplier", [1e-3, 0.5, 4.0, 1e3])
@pytest.mark.parametrize("norm", [1e-6, 0.2, 1e4])
def test_a_step_is_a_power_of_two_and_honest_sums_have_room_beside_their_noise(silos, multiplier, norm):
    plan = client_plan(max_grad_norm=norm, noise_multiplier=multiplier, rounds=1, num_clients=1000).for_clients()
    encoding = client_encoding(plan, silos)
    step = step_of(encoding)
    assert step.numerator == 1 or step.denominator == 1
    assert (step.numerator * step.denominator).bit_count() == 1
    longest = silos * Fraction(norm) + 10 * Fraction(plan.noise_std)
    assert longest / step + 1 <= 2**31 - 1
    assert norm <= encoding.clip
    assert step <= max(longest / 2**29, Fraction(plan.noise_std) / 2**20)  # no coarser than it has to be


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 0.1, 1.0, 1e30])
def test_words_are_never_longer_than_the_clipping_norm_and_off_by_less_than_a_step(scale):
    encoding = client_encoding(PLAN, 5)
    for update in updates(3, scale=scale):
        words = client_words(update, C, encoding).view(np.int32)
        step = step_of(encoding)
        assert sum((int(word) * step) ** 2 for word in words) <= Fraction(C) ** 2
        flat = [Fraction(float(value)) for name in "ab" for value in update[name].reshape(-1)]
        norm = max(1.0, float(np.sqrt(float(sum(value**2 for value in flat)))) / C)
        assert all(
            abs(value) / Fraction(norm) * (1 - Fraction(1, 2**29)) - step < abs(int(word)) * step <= abs(value)
            for value, word in zip(flat, words, strict=True)
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_counts_as_zeros(bad):
    (update,) = updates(1, silos=1)
    update["a"][4] = bad
    assert not client_words(update, C, client_encoding(PLAN, 3)).any()


@pytest.mark.parametrize("elsewhere", [0, 2**31 - 3, 2**31, 2**31 + 2, MODULUS - 1])
def test_wherever_others_have_put_the_sum_a_client_moves_it_by_its_own_words(elsewhere):
    """One that lies may bring the sum to where words wrap; what an honest one adds is no more than elsewhere."""
    encoding = client_encoding(PLAN, 5)
    words = client_words(updates(8)[0], C, encoding)
    others = np.full(len(words), elsewhere, np.uint32)
    without, with_it = (
        steps(noised_client_mean(total, PLAN, encoding, STREAMS), PLAN, encoding) for total in (others, others + words)
    )
    moved = [(int(after) - int(before)) % MODULUS for before, after in zip(without, with_it, strict=True)]
    assert moved == [int(word) for word in words]


def test_the_noise_is_the_plans_and_the_rest_is_the_sum():
    plan = client_plan(max_grad_norm=C, noise_multiplier=1.3, rounds=2, num_clients=7).for_clients()
    encoding = client_encoding(plan, 5)
    noise = noised_client_mean(np.zeros(200_000, np.uint32), plan, encoding, STREAMS) * 7
    assert noise.std() == pytest.approx(plan.noise_std, rel=0.01)  # 6 deviations of an estimate from so many
    assert abs(noise.mean()) < 6 * plan.noise_std / np.sqrt(200_000)
    given = updates(2)
    total = sum(client_words(update, C, encoding).astype(np.int64) for update in given).astype(np.uint32)
    released, alone = (
        noised_client_mean(words, plan, encoding, STREAMS) * 7 for words in (total, np.zeros_like(total))
    )
    in_the_clear = ClippedSum(
        given[0], client_plan(max_grad_norm=C, noise_multiplier=1e-9, rounds=1, num_clients=7).for_clients()
    )
    for number, update in enumerate(given):
        in_the_clear.add(f"{number}", update)
    means = in_the_clear.noised_mean(STREAMS)
    exact = np.concatenate([means[name].reshape(-1) for name in "ab"]) * 7.0
    assert np.abs(released - alone - exact).max() <= 5 * float(step_of(encoding)) + 1e-6 * C
