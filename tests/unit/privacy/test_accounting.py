"""The plan and the accountant against dp-accounting's own event accountant and figures measured elsewhere."""

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from pydantic import ValidationError

from configs.errors import InputError, PolicyRefusal
from privacy.accountant import calibrate, guarantee, pld_epsilon
from privacy.plan import PlanRequest
from privacy.schedule import Schedule


def request(**changes):
    values = {
        "sampling_rate": 0.03,
        "max_grad_norm": 1.0,
        "noise_multiplier": 0.59,
        "rounds": 3,
        "steps_per_round": 12,
        "delta": 1e-5,
    }
    return PlanRequest(**{**values, **changes})


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta"), [(0.03, 0.59, 36, 1e-5), (0.01, 1.0, 1000, 1e-5), (0.001, 0.6, 500, 1e-6)]
)
def test_epsilon_is_that_of_dp_accountings_event(q, sigma, steps, delta):
    event = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
    oracle = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE).compose(event, steps)
    expected = oracle.get_epsilon(delta)  # with bins of 1e-4; ours are as wide or wider, and so never below it
    assert expected * (1 - 1e-9) <= pld_epsilon(q, sigma, steps, delta) <= expected * 1.001


def test_the_accountants_agree_as_far_as_they_should():
    found = guarantee(Schedule(1000, 0.01, 1.0), 1e-5)
    assert found.epsilon == pytest.approx(1.828, abs=2e-3)
    assert found.epsilon_rdp == pytest.approx(2.101, abs=2e-3)
    assert 1.818 < found.epsilon_prv < 1.840
    assert found.epsilon_optimistic <= found.epsilon


@pytest.mark.parametrize(("epsilon", "q", "steps"), [(8.0, 0.02, 20), (2.0, 0.03, 36), (0.5, 0.01, 10)])
def test_calibration_finds_the_smallest_noise_that_is_enough(epsilon, q, steps):
    sigma = calibrate(epsilon, 1e-5, Schedule(steps, q, 1.0))
    assert pld_epsilon(q, sigma, steps, 1e-5) <= epsilon
    assert pld_epsilon(q, sigma * 0.998, steps, 1e-5) > epsilon


def test_an_epsilon_out_of_reach_is_refused():
    with pytest.raises(InputError, match=r"privacy.epsilon is 1e-05.*raise privacy.epsilon"):
        calibrate(1e-5, 1e-9, Schedule(100_000, 0.5, 1.0))


def test_everything_of_a_silos_size_comes_from_its_declared_count():
    plan = request().bind(5000)
    assert plan.expected_batch_size == pytest.approx(150)
    assert plan.noise_std == 0.59
    assert plan.inclusion_threshold / 2**64 <= 0.03
    assert plan.inclusion_threshold / 2**64 == pytest.approx(0.03)


def test_delta_must_suit_the_declared_count():
    assert request().bind(10_000)
    with pytest.raises(PolicyRefusal, match=r"allows at most 9.99e-06") as caught:
        request().bind(10_010)
    assert caught.value.rule == "delta"


def test_plans_are_frozen_digested_and_travel_as_json():
    plan = request()
    with pytest.raises(ValidationError):
        plan.noise_multiplier = 0.1
    assert PlanRequest.model_validate_json(plan.model_dump_json()) == plan
    assert PlanRequest.model_validate_json(plan.model_dump_json()).digest == plan.digest
    assert request(noise_multiplier=0.6).digest != plan.digest
    assert plan.epsilon == pytest.approx(6.0008, abs=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.0},
        {"noise_multiplier": float("inf")},
        {"noise_multiplier": float("nan")},
        {"noise_multiplier": 0.0},
        {"max_grad_norm": -1.0},
        {"rounds": 0},
        {"delta": 1e-4},
        {"sampler": "shuffle"},
        {"relation": "replace_one"},
        {"version": 3},
        {"surprise": 1},
    ],
)
def test_inconsistent_plans_are_refused(changes):
    with pytest.raises(ValidationError):
        request(**changes)
