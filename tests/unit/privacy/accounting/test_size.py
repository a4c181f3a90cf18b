"""How large an accounting may get: nothing that passes the bound takes more than memory and seconds allow.

Before there was a bound, ``Schedule(10**8, 1e-6, 0.3)``, which the default policy allows, took all of 18.7 GB.
"""

import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from dp_accounting.pld import common
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import InputError, PolicyRefusal
from privacy.accounting.accountant import calibrate, guarantee, schedule_epsilon
from privacy.accounting.schedule import Schedule
from privacy.accounting.size import LARGEST_BINS, bins, check_size
from privacy.accounting.truncation import Truncation
from privacy.certificate.check import check_certificate
from privacy.plan import LARGEST_DELTA, SMALLEST_DELTA, MetricRelease, PlanTerms

MEMORY_BYTES, TIME_S = 3 * 2**30, 120  # of address space, libraries included
PLAN = PlanTerms(sampling_rate=0.05, max_grad_norm=1.0, noise_multiplier=0.8, rounds=2, steps_per_round=2, delta=1e-5)


def powers(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers over many orders of magnitude."""
    return st.floats(math.log(low), math.log(high)).map(math.exp)


@contextmanager
def recorded() -> Iterator[list[int]]:
    """The lengths of all arrays that dp-accounting composes."""
    lengths, before = [0], common.self_convolve

    def self_convolve(array, times, tail):
        low, high = common.compute_self_convolve_bounds(array, times, tail)
        lengths.extend((len(array), high - low + 1))
        assert high - low < 2**24, "too long to be computed here"
        return before(array, times, tail)

    common.self_convolve = self_convolve
    try:
        yield lengths
    finally:
        common.self_convolve = before


@settings(max_examples=100, deadline=None)
@given(
    steps=powers(1, 1e9).map(int),
    q=powers(1e-9, 0.999),
    sigma=powers(0.15, 1e3),
    cap=st.none() | st.tuples(powers(10, 1e7).map(int), st.floats(1, 3)),
    releases=st.none() | st.tuples(powers(0.5, 100), powers(1, 1000).map(int)),
    fixed_bins=st.booleans(),
)
def test_no_composition_has_more_bins_than_the_bound(steps, q, sigma, cap, releases, fixed_bins):
    truncation = None if cap is None else Truncation(cap[0], math.ceil(cap[0] * q * cap[1]))
    schedule = Schedule(steps, q, sigma, truncation, () if releases is None else (releases,), fixed_bins)
    if schedule.hopeless or bins(schedule, schedule.width()) > 2e5:  # fractions of a second each; the rest is below
        return
    with recorded() as lengths:
        schedule_epsilon.__wrapped__(schedule, 1e-6)
    assert max(lengths) <= bins(schedule, schedule.width())


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_the_bound_itself_has_an_answer_for_every_plan(data):
    number = st.floats(min_value=5e-324, allow_nan=False, allow_infinity=False)
    metric = MetricRelease(name="a", noise_multiplier=data.draw(number), releases=data.draw(st.integers(1, 10**5)))
    plan = PLAN.model_copy(
        update={
            "sampling_rate": data.draw(st.floats(min_value=5e-324, max_value=1, exclude_max=True)),
            "noise_multiplier": data.draw(number),
            "rounds": data.draw(st.integers(1, 10**5)),
            "steps_per_round": data.draw(st.integers(1, 10**5)),
            "metric_releases": (metric,) if data.draw(st.booleans()) else (),
        }
    )
    try:
        check_size(plan.schedule)
    except PolicyRefusal as refusal:
        assert refusal.rule == "accounting"


WORST = [  # what is composed longest, and what took most, of hundreds at random just below the bound
    Schedule(1_000_000, 0.001, 0.8),
    Schedule(130, 2.3e-5, 880.0, None, ((0.84, 4405),)),
]


def test_what_passes_is_accounted_in_bounded_memory():
    """Each in one process that dies of a byte too many. Measured: at most 1.4 GiB, 10 s."""
    for schedule in WORST:
        assert 0.5 * LARGEST_BINS < bins(schedule, schedule.width()) < LARGEST_BINS
    code = (
        "import resource\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_BYTES}, {MEMORY_BYTES}))\n"
        "from privacy.accounting.schedule import Schedule\n"
        "from privacy.accounting.accountant import schedule_epsilon\n"
        f"print([schedule_epsilon(schedule, 1e-6) > 0 for schedule in {WORST!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIME_S, check=False)
    assert done.stdout.strip() == str([True] * len(WORST)), done.stderr


HOSTILE = {
    "the smallest rate for ever": Schedule(10**8, 1e-6, 0.3),
    "all that a plan may say": Schedule(10**10, 1e-6, 0.3),
    "many metric releases": Schedule(4, 0.05, 0.8, releases=((0.3, 10**5),)),
    "a metric without noise": Schedule(4, 0.05, 0.8, releases=((1e-300, 1),)),
    "no noise": Schedule(4, 0.05, 5e-324),
    "endless noise": Schedule(4, 0.05, 1e308),
    "a cap": Schedule(10**8, 1e-6, 0.3, Truncation(10**12, 10**6 + 1)),
    "the bins of version 1": Schedule(10**7, 0.01, 1.0, fixed_bins=True),
    "clients without noise": Schedule(10, 1.0, 1e-200),
}


@pytest.mark.parametrize("schedule", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_schedule_is_refused_before_anything_is_built(schedule, monkeypatch):
    monkeypatch.setattr(Schedule, "pld", None)
    with pytest.raises(PolicyRefusal, match=r"^accounting: .*, allowed .*: ") as caught:
        schedule_epsilon(schedule, 1e-6)
    assert caught.value.rule == "accounting"


def test_what_stands_beside_the_claim_is_bounded_too(monkeypatch):
    """Opacus' accountant has bins of its own: for this schedule it took all of 20 GB."""
    schedule = Schedule(37_481_776, 4.1e-8, 0.124)
    check_size(schedule)

    def built(*_):
        pytest.fail("built")

    monkeypatch.setattr("opacus.accountants.prv.discretize", built)
    found = guarantee(schedule, 1e-6)
    assert (found.epsilon_optimistic, found.epsilon_prv) == (0.0, None)  # for the former floating point ends
    assert found.epsilon == pytest.approx(190, rel=0.02)


@pytest.mark.parametrize("q", [0.001, 0.03])
def test_long_but_honest_schedules_pass(q):
    for steps, sigma in [(36, 0.3), (1000, 0.5), (20_000, 0.6), (100_000, 1.0)]:
        check_size(Schedule(steps, q, sigma))
        check_size(Schedule(steps, q, sigma, releases=((20.0, 100), (630.0, 1000))))


def test_long_plans_of_version_1_are_still_read():
    long = Schedule(100_000, 0.001, 0.6, fixed_bins=True)
    check_size(long)
    with pytest.raises(PolicyRefusal, match=r"^accounting: "):  # before: twice the time, for whoever says version 1
        check_size(long, new=True)


def test_calibration_tells_an_honest_user_the_same():
    with pytest.raises(PolicyRefusal, match=r"accounting: .* lower the rounds, steps or metric releases"):
        calibrate(1.0, 1e-6, Schedule(10**6, 1e-5, 1.0))


def test_a_strangers_certificate_is_not_accounted_for_without_end():
    hostile = PLAN.model_copy(
        update={"sampling_rate": 1e-6, "noise_multiplier": 0.3, "rounds": 10**5, "steps_per_round": 1000}
    )
    document = {"version": 3, "run_id": "r", "plan": hostile.model_dump(), "versions": {}, "silos": {}}
    with pytest.raises(InputError, match=r"c\.json: plan: accounting: "):
        check_certificate(document, "c.json")


def test_every_delta_of_a_plan_has_a_margin():
    for delta in (SMALLEST_DELTA, LARGEST_DELTA):
        plan = {**PLAN.model_dump(), "sampler": "truncated_poisson", "max_batch_size": 10**5, "max_units": 10**6}
        request = PlanTerms(**{**plan, "delta": delta, "rounds": 10**5})
        assert request.passes_size_test(10)
    with pytest.raises(ValueError, match="delta"):
        PlanTerms(**{**PLAN.model_dump(), "delta": 5e-324})
