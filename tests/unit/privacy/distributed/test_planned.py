"""A plan whose silos make the noise together: what it is charged, against dp-accounting, and what stays as it was."""

import dp_accounting as dp
import pytest
from dp_accounting.pld import PLDAccountant

from configs.errors import InputError
from configs.load import load
from configs.run_directory import config_digest
from privacy.distributed.planned import of_length
from privacy.plan import PlanTerms
from privacy.plan_from_settings import plan_terms
from privacy.secure_sum import SecureSum, SharedNoise

SHARED = (
    "federated.secure_aggregation=true",
    "federated.colluders=1",
    "privacy.mode=distributed",
    "privacy.min_honest=3",
    "federated.local_steps=1",
    "federated.optimizer=sgd",
    "federated.rounds=40",
)
NOISE = SharedNoise(min_honest=5, reach=100.0, values=2**20)
PLAN = PlanTerms(
    sampling_rate=0.05,
    max_grad_norm=1.0,
    noise_multiplier=1.1,
    rounds=60,
    steps_per_round=1,
    delta=1e-5,
    secure_sum=SecureSum(colluders=2, noise=NOISE),
)


def by_dp_accounting(plan, noise_multiplier):
    """Of Poisson-sampled Gaussian steps and the metrics' releases, by an accountant that knows nothing of shares."""
    step = dp.PoissonSampledDpEvent(plan.sampling_rate, dp.GaussianDpEvent(noise_multiplier))
    beside = [
        dp.SelfComposedDpEvent(dp.GaussianDpEvent(metric.noise_multiplier), metric.releases)
        for metric in plan.metric_releases
    ]
    event = dp.ComposedDpEvent([dp.SelfComposedDpEvent(step, plan.steps), *beside])
    accountant = PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-3)
    return accountant.compose(event).get_epsilon(plan.delta)


@pytest.mark.parametrize("metrics", [(), ({"name": "held_out", "noise_multiplier": 5.0, "releases": 3},)])
@pytest.mark.parametrize("noise", [NOISE, NOISE.model_copy(update={"values": 1000, "word_bits": 16, "reach": 10.0})])
def test_the_charge_is_that_of_a_gaussian_with_the_noise_of_min_honest_shares(metrics, noise):
    plan = PlanTerms.model_validate(
        {**PLAN.model_dump(), "metric_releases": metrics, "secure_sum": {"colluders": 2, "noise": noise.model_dump()}}
    )
    central = by_dp_accounting(plan, plan.noise_multiplier)
    assert plan.schedule.noise_multiplier < plan.noise_multiplier
    assert central <= plan.epsilon * 1.0005 and plan.epsilon <= central * (1.005 if noise is NOISE else 1.3)
    # The accountant's own numbers of the event that the plan gives out lie no higher.
    assert by_dp_accounting(plan, plan.schedule.noise_multiplier) == pytest.approx(plan.epsilon, rel=5e-3)
    found = plan.guarantee()
    assert (found.epsilon, found.delta) == (plan.epsilon, plan.delta) and found.epsilon_optimistic <= found.epsilon


def test_more_survivors_never_lower_the_charge_and_fewer_honest_silos_do_not_change_it():
    """The noise multiplier is that of ``min_honest`` shares, however many come; only rounding knows of the rest."""
    for change in ({"min_survivors": 9}, {"min_survivors": 11}):
        other = PLAN.model_copy(update={"secure_sum": PLAN.secure_sum.model_copy(update=change)})
        assert other.epsilon == PLAN.epsilon and other.digest != PLAN.digest
    assert PLAN.noise.noise_std(5) == pytest.approx(1.1) and PLAN.noise.noise_std(9) > PLAN.noise.noise_std(5)
    assert PLAN.secure_sum.fewest == PLAN.noise.min_survivors == 7


def test_steps_and_deviation_do_not_depend_on_how_many_values_there_are():
    short = of_length(PLAN.noise, 12)
    assert (short.step, short.share_bits, short.dimension) == (PLAN.noise.step, PLAN.noise.share_bits, 12)


def test_plans_of_before_are_written_as_they_were():
    plain = SecureSum(colluders=1, min_survivors=4)
    assert plain.model_dump() == {"colluders": 1, "min_survivors": 4} and plain.most == 0
    assert SecureSum.model_validate(PLAN.secure_sum.model_dump()) == PLAN.secure_sum
    assert PlanTerms.model_validate_json(PLAN.model_dump_json()).digest == PLAN.digest


def test_the_settings_plan_spends_its_epsilon_with_nearly_the_noise_of_data_in_one_place():
    config = load("tiny", [*SHARED, "privacy.epsilon=2", "privacy.evaluations=1"])
    plan = plan_terms(config)
    alone = load("tiny", [*SHARED[4:], "privacy.epsilon=2", "privacy.evaluations=1"])
    central = plan_terms(alone)
    assert 1.99 < plan.epsilon <= 2
    assert central.noise_multiplier <= plan.noise_multiplier < 1.003 * central.noise_multiplier
    assert plan.secure_sum.noise.min_honest == 3 and plan.noise.silos == 6
    batch = plan.sampling_rate * max(config.data.private.public_record_counts.values())
    assert plan.noise.reach >= (batch + 10 * batch**0.5) * plan.max_grad_norm
    assert config_digest(config) != config_digest(load("tiny", ["federated.secure_aggregation=true", *SHARED[4:]]))


def test_noise_that_words_have_no_room_for_is_refused_in_one_line_with_its_settings():
    large = (
        "data.private.public_record_counts={}",
        "data.private.public_record_count=1000000000",
        "privacy.delta=1e-10",
    )
    with pytest.raises(
        InputError, match=r"privacy\.mode is 'distributed' with privacy\.min_honest 3: .*lower that"
    ) as told:
        plan_terms(load("tiny", [*SHARED, *large]))
    assert "\n" not in str(told.value)
    with pytest.raises(InputError, match=r"no noise multiplier up to 10,?000 reaches it"):
        plan_terms(load("tiny", [*SHARED, "privacy.epsilon=1e-7"]))
