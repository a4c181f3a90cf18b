"""Plans: which are consistent, how they are written and digested, and that event, sampler and epsilon are one thing."""

import math
from dataclasses import replace

import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation
from dp_accounting.pld import PLDAccountant
from pydantic import ValidationError

from configs.errors import InputError, PolicyRefusal
from configs.load import load
from configs.parse import parse
from configs.storage.files import canonical_json, digest_json
from privacy.accounting.accountant import schedule_epsilon
from privacy.accounting.truncation import FAILURE_SHARE, size_margin, size_noise, units_for
from privacy.ledger.replay import replay
from privacy.plan import MetricRelease, PlanTerms
from privacy.plan_from_settings import plan_terms

RECORD = {
    "sampling_rate": 0.03,
    "max_grad_norm": 1.0,
    "noise_multiplier": 0.8,
    "rounds": 3,
    "steps_per_round": 12,
    "delta": 1e-5,
}
CLIENT = {
    "unit": "client",
    "relation": "zero_out",
    "sampler": "all",
    "sampling_rate": 1.0,
    "max_grad_norm": 1.0,
    "noise_multiplier": 2.02,
    "rounds": 10,
    "steps_per_round": 1,
    "delta": 1e-5,
    "num_clients": 50,
}
TRUNCATED = {**RECORD, "sampler": "truncated_poisson", "max_batch_size": 100, "max_units": 2000}
QUANTILE = {"clipping_function": "quantile", "target_quantile": 0.5}
METRICS = [
    {"name": "nats", "noise_multiplier": 20.0, "releases": 3},
    {"name": "f1", "noise_multiplier": 15, "releases": 1},
]


def test_a_rate_below_the_samplers_bits_is_none():
    """Before: the smallest floats were taken, and the accountant failed on them."""
    for rate in (5e-324, 2.0**-64 * (1 - 1e-15)):
        with pytest.raises(ValidationError, match="sampling_rate"):
            PlanTerms(**{**RECORD, "sampling_rate": rate})
    smallest = PlanTerms(**{**RECORD, "sampling_rate": 2.0**-64})
    assert smallest.bind(100).inclusion_threshold == 1
    assert 0 <= smallest.epsilon < 1e-9


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({**RECORD, "sampling_rate": 1.0}, "sampler is 'poisson' at sampling_rate 1: with unit 'record' give"),
        ({**RECORD, "sampler": "all"}, "sampler is 'all' at sampling_rate 0.03: with unit 'record' give"),
        ({**RECORD, "relation": "zero_out"}, "relation is 'zero_out': with unit 'record' give 'add_or_remove_one'"),
        ({**RECORD, "num_clients": 3}, "num_clients is 3: with unit 'record' give 0"),
        ({**RECORD, "max_batch_size": 9}, "max_batch_size is 9 and max_units 0: give 0 for both, or sampler"),
        ({**RECORD, "max_units": 9}, "max_batch_size is 0 and max_units 9: give 0 for both, or sampler"),
        ({**TRUNCATED, "max_batch_size": 0}, "sampler 'truncated_poisson' needs both"),
        ({**TRUNCATED, "max_units": 0}, "sampler 'truncated_poisson' needs both"),
        ({**TRUNCATED, "max_batch_size": 59}, "max_batch_size is 59: below the expected batch of 60"),
        ({**TRUNCATED, "max_batch_size": -1}, "max_batch_size is -1: input should be greater"),
        ({**CLIENT, "sampling_rate": 0.5}, "who takes part is not secret, and so sampling clients amplifies nothing"),
        ({**CLIENT, "relation": "add_or_remove_one"}, "with unit 'client' give 'zero_out'"),
        ({**CLIENT, "sampler": "poisson"}, "sampler is 'poisson': with unit 'client' give 'all'"),
        ({**CLIENT, "sampler": "truncated_poisson"}, "sampler is 'truncated_poisson': with unit 'client' give 'all'"),
        ({**CLIENT, "steps_per_round": 2}, "steps_per_round is 2: with unit 'client' give 1"),
        ({**CLIENT, "num_clients": 0}, "num_clients is 0: with delta 1e-05 give 1 to 10000"),
        ({**CLIENT, "num_clients": 10_001}, "num_clients is 10001: with delta 1e-05 give 1 to 10000"),
        (
            {**RECORD, "clipping_function": "quantile"},
            "target_quantile is 0 with clipping_function 'quantile': give one",
        ),
        ({**RECORD, "target_quantile": 0.5}, "target_quantile is 0.5 with clipping_function 'fixed': give one above 0"),
        ({**CLIENT, **QUANTILE}, "clipping_function is 'quantile': it is for unit 'record'"),
        (
            {**RECORD, "metric_releases": [METRICS[0], METRICS[0]]},
            "metric_releases has the names nats, nats: give each",
        ),
        ({**RECORD, "metric_releases": [{**METRICS[0], "releases": 0}]}, "metric_releases.0.releases is 0"),
        (
            {**RECORD, "metric_releases": [{**METRICS[0], "noise_multiplier": 0}]},
            "metric_releases.0.noise_multiplier is 0",
        ),
        ({**RECORD, "metric_releases": [{**METRICS[0], "noise_multiplier": math.inf}]}, "should be a finite number"),
        ({**RECORD, "metric_releases": [{**METRICS[0], "name": "a b"}]}, "metric_releases.0.name is 'a b'"),
        ({**CLIENT, "version": 1}, "version is 1: its plans have unit 'record'"),
        ({**TRUNCATED, "version": 1}, "version is 1: its plans have unit 'record'"),
        ({**RECORD, "version": 1, "metric_releases": METRICS}, "version is 1: its plans have unit 'record'"),
        ({**RECORD, "version": 3}, "version is 3"),
        ({**RECORD, "surprise": 1}, "surprise: no such setting"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_field_and_fix(tree, expected):
    with pytest.raises(InputError) as caught:
        parse(PlanTerms, tree, "plan")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tree", [RECORD, CLIENT, TRUNCATED, {**RECORD, "metric_releases": METRICS}])
def test_plans_are_frozen_digested_and_travel_as_json(tree):
    plan = PlanTerms(**tree)
    with pytest.raises(ValidationError):
        plan.noise_multiplier = 0.1
    again = PlanTerms.model_validate_json(canonical_json(plan.model_dump()))
    assert again == plan
    assert again.digest == plan.digest == digest_json(plan.model_dump())
    assert hash(again.schedule) == hash(plan.schedule)


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_multiplier": 0.81},
        {"sampling_rate": 0.031},
        {"max_grad_norm": 2.0},
        {"rounds": 4},
        {"steps_per_round": 13},
        {"delta": 9e-6},
        {"version": 1},
        {"sampler": "truncated_poisson", "max_batch_size": 100, "max_units": 2000},
        {"metric_releases": METRICS},
        {"clipping_function": "automatic"},
        QUANTILE,
    ],
)
def test_whatever_changes_the_guarantee_changes_the_digest(changes):
    assert PlanTerms(**{**RECORD, **changes}).digest != PlanTerms(**RECORD).digest


# As they were written before there was a version 2: tree, digest and reserved epsilon.
VERSION_1 = [
    (
        {**RECORD, "noise_multiplier": 0.59},
        "d3d4cd51f88640c6b0b5a76fe425bc7f7182b19547212b8a84304fde7b61eced",
        6.0008482513299795,
    ),
    (
        {
            **RECORD,
            "sampling_rate": 0.01,
            "max_grad_norm": 0.5,
            "noise_multiplier": 1.0,
            "rounds": 50,
            "steps_per_round": 20,
        },
        "1de2e3894aab687ad3d5ec702312320ba43b7ae4aff11cabdc5ef2bab19404d1",
        1.828243645591767,
    ),
]


@pytest.mark.parametrize(("changes", "digest", "epsilon"), VERSION_1)
def test_plans_of_version_1_keep_digest_and_epsilon_and_old_ledgers_replay(changes, digest, epsilon):
    written = {"version": 1, "unit": "record", "relation": "add_or_remove_one", "sampler": "poisson", **changes}
    plan = PlanTerms(**written)
    assert plan.model_dump() == written
    assert plan.digest == digest == digest_json(written)
    assert plan.epsilon == pytest.approx(epsilon, rel=1e-9)
    opening = {"number": 1, "kind": "open", "epsilon": 20.0, "delta": 1e-4}
    entry = {
        "number": 2,
        "kind": "reserve",
        "run": "r",
        "plan": written,
        "plan_digest": digest,
        "public_record_count": 1000,
        "delta": plan.delta,
    }
    replay([opening, {**entry, "epsilon": epsilon}], "old.sqlite")
    with pytest.raises(InputError, match="claims epsilon"):
        replay([opening, {**entry, "epsilon": 0.9 * epsilon}], "old.sqlite")


@pytest.mark.parametrize(
    ("tree", "relation"),
    [
        (RECORD, NeighboringRelation.ADD_OR_REMOVE_ONE),
        ({**RECORD, "metric_releases": METRICS}, NeighboringRelation.ADD_OR_REMOVE_ONE),
        (CLIENT, NeighboringRelation.REPLACE_SPECIAL),
        ({**CLIENT, "metric_releases": METRICS}, NeighboringRelation.REPLACE_SPECIAL),
    ],
)
def test_epsilon_is_that_of_dp_accountings_accountant_for_the_plans_event(tree, relation):
    plan = PlanTerms(**tree)
    expected = PLDAccountant(relation).compose(plan.event()).get_epsilon(plan.delta)
    assert plan.epsilon == pytest.approx(expected, rel=1e-3)


def test_every_metric_release_costs_and_more_noise_costs_less():
    def epsilon(*metrics):
        return PlanTerms(**{**RECORD, "metric_releases": metrics}).epsilon

    once, often, quiet = (
        MetricRelease(name="nats", noise_multiplier=sigma, releases=releases)
        for sigma, releases in ((8.0, 1), (8.0, 3), (80.0, 1))
    )
    assert PlanTerms(**RECORD).epsilon < epsilon(quiet) < epsilon(once) < epsilon(often)
    assert epsilon(often, MetricRelease(name="f1", noise_multiplier=8.0, releases=1)) > epsilon(often)


def test_a_plan_is_calibrated_with_its_metric_releases():
    bare, with_metrics = (PlanTerms(**RECORD, metric_releases=m).calibrated(2.0) for m in ((), METRICS))
    for plan in (bare, with_metrics):
        assert 0.998 * 2.0 < plan.epsilon <= 2.0
    assert with_metrics.noise_multiplier > bare.noise_multiplier
    loud = [{"name": "nats", "noise_multiplier": 0.5, "releases": 3}]
    with pytest.raises(InputError, match=r"beside the metric releases; raise privacy.epsilon"):
        PlanTerms(**RECORD, metric_releases=loud).calibrated(2.0)


def test_everything_of_a_silos_size_comes_from_its_declared_count():
    plan = PlanTerms(**RECORD).bind(5000)
    assert plan.expected_batch_size == pytest.approx(150)
    assert plan.noise_std == 0.8
    assert plan.inclusion_threshold / 2**64 <= 0.03
    assert plan.inclusion_threshold / 2**64 == pytest.approx(0.03)


def test_a_silo_binds_only_what_it_can_keep():
    assert PlanTerms(**RECORD).bind(10_000)
    with pytest.raises(PolicyRefusal, match=r"allows at most 9.99e-06") as caught:
        PlanTerms(**RECORD).bind(10_010)
    assert caught.value.rule == "delta"
    with pytest.raises(PolicyRefusal, match="silos train with records as units") as caught:
        PlanTerms(**CLIENT).bind(50)
    assert caught.value.rule == "unit"
    largest = 2000 - size_margin(3, 1e-5)
    assert PlanTerms(**TRUNCATED).bind(largest)
    with pytest.raises(PolicyRefusal, match="too large for this plan") as caught:
        PlanTerms(**TRUNCATED).bind(largest + 1)
    assert (caught.value.rule, caught.value.allowed) == ("max_units", "at least 2001")


@pytest.mark.parametrize("rounds", [1, 3, 100])
@pytest.mark.parametrize("delta", [1e-5, 1e-9])
def test_a_dataset_too_large_for_truncation_passes_its_tests_with_a_share_of_delta(rounds, delta):
    def upper_tail(x):
        return math.erfc(x / math.sqrt(2)) / 2

    assert rounds * upper_tail(size_margin(rounds, delta) / size_noise(rounds)) <= FAILURE_SHARE * delta
    slack = units_for(1000, rounds, delta) - size_margin(rounds, delta) - 1000
    assert upper_tail(slack / size_noise(rounds)) < 1e-4


def test_settings_become_the_plan():
    config = load("tiny", ["privacy.sampler=truncated_poisson", "privacy.max_batch_size=100"])
    plan = plan_terms(config)
    assert (plan.sampler, plan.max_batch_size) == ("truncated_poisson", 100)
    private = config.data.private
    largest = max(private.public_record_count, *private.public_record_counts.values(), 0)
    assert plan.bind(largest)
    assert plan.epsilon <= config.privacy.epsilon
    with pytest.raises(InputError, match=r"below the expected batch.*lower sampling_rate"):
        plan_terms(load("tiny", ["privacy.sampler=truncated_poisson", "privacy.max_batch_size=1"]))
    for override in ("privacy.sampler=truncated_poisson", "privacy.max_batch_size=60"):
        with pytest.raises(InputError, match="give 0 with 'poisson', a cap with 'truncated_poisson'"):
            load("tiny", [override])


def test_sum_and_count_of_quantile_clipping_are_together_what_is_accounted():
    """Both Gaussians composed by dp-accounting spend what one with the plan's noise multiplier does."""
    request = PlanTerms(**{**RECORD, **QUANTILE})
    plan = request.bind(1000)
    assert request.epsilon == PlanTerms(**RECORD).epsilon
    assert plan.noise_std > request.noise_multiplier * request.max_grad_norm
    count_multiplier = plan.count_noise_std / 0.5  # a record moves the count by a half
    both = PLDAccountant().compose(GaussianDpEvent(plan.noise_std)).compose(GaussianDpEvent(count_multiplier))
    one = PLDAccountant().compose(GaussianDpEvent(request.noise_multiplier))
    assert both.get_epsilon(1e-5) == pytest.approx(one.get_epsilon(1e-5), rel=1e-3)


def test_quantile_clipping_is_refused_where_the_count_would_take_all_the_noise():
    request = PlanTerms(**{**RECORD, **QUANTILE})
    with pytest.raises(PolicyRefusal, match="expected batches above 8"):
        request.bind(200)


def test_the_size_tests_noise_is_part_of_what_a_truncated_plan_spends():
    schedule = PlanTerms(**TRUNCATED).schedule
    assert schedule.releases == ((size_noise(3), 3),)
    assert schedule_epsilon(schedule, 1e-5) > schedule_epsilon(replace(schedule, releases=()), 1e-5)
