"""What the runs of a study reserve together, by the ledger's own entries, against sums that are made beside it."""

import json
import math
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import PolicyRefusal
from privacy.ledger.chain import Budget
from privacy.ledger.journal import Journal
from privacy.ledger.ledger import Ledger
from privacy.ledger.limits import Limits, Study, spent_by
from privacy.ledger.reconcile import reconcile
from privacy.plan import PlanTerms

PLANS = [
    PlanTerms(sampling_rate=0.02, max_grad_norm=1.0, noise_multiplier=noise, rounds=1, steps_per_round=1, delta=delta)
    for noise, delta in ((1.0, 1e-6), (2.0, 2e-6), (4.0, 1e-7))
]
CAPS = {"first": (1.5, 5e-6), "second": (0.4, 2e-5)}


def opened(folder):
    return Ledger.open(folder, "north", "ward", Budget(1000.0, 1.0))


def under(name):
    return Limits(study=Study(name, "ab" * 32, 0.0, *CAPS[name])) if name else Limits()


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["first", "second", ""]), st.sampled_from(PLANS)), max_size=12))
def test_a_study_reserves_what_its_mandate_allows_and_not_a_run_more(tmp_path_factory, asked):
    ledger = opened(tmp_path_factory.mktemp("ledger"))
    spent = {name: [Fraction(0), Fraction(0)] for name in CAPS}
    for number, (name, plan) in enumerate(asked):
        wanted = Fraction(plan.epsilon), Fraction(plan.delta)
        fits = not name or all(
            float(before + more) <= cap * (1 + 1e-12)
            for before, more, cap in zip(spent[name], wanted, CAPS[name], strict=True)
        )
        if fits:
            ledger.reserve(f"run-{number}", plan.bind(1000), under(name))
            if name:
                spent[name] = [before + more for before, more in zip(spent[name], wanted, strict=True)]
        else:
            with pytest.raises(PolicyRefusal, match=r"mandate\.budget_(epsilon|delta): the run needs"):
                ledger.reserve(f"run-{number}", plan.bind(1000), under(name))
    for name, (epsilon, delta) in spent.items():
        found = spent_by(ledger.journal.bodies(), name)
        assert math.isclose(found.epsilon, float(epsilon), rel_tol=1e-12)
        assert math.isclose(found.delta, float(delta), rel_tol=1e-12)
    ledger.close_file()


def test_a_ledger_that_was_put_back_counts_what_it_lost_for_every_study(tmp_path):
    """Nobody can tell in whose name the lost runs were reserved, and no study may spend more than it was allowed."""
    ledger, place = opened(tmp_path / "state"), tmp_path / "state" / "ledger.sqlite"
    ledger.journal.scrub()
    ledger.close_file()
    before = place.read_bytes()
    ledger = opened(tmp_path / "state")
    receipt = ledger.reserve("lost", PLANS[1].bind(1000), under("second"))
    ledger.close_file()
    for path in place.parent.glob("ledger.sqlite-*"):
        path.unlink()
    place.write_bytes(before)
    journal = Journal(tmp_path / "state", tmp_path / "state.anchor", "north", "ward")
    reconcile(journal, Budget(1000.0, 1.0), [receipt])
    for name in CAPS:
        assert math.isclose(spent_by(journal.bodies(), name).epsilon, PLANS[1].epsilon)
    journal.db.close()


def test_a_reservation_of_no_study_is_written_as_before(tmp_path):
    ledger = opened(tmp_path / "state")
    receipt = ledger.reserve("run", PLANS[0].bind(1000))
    assert not {"study", "mandate"} & set(json.loads(ledger.entries()[-1]["body"]))
    assert "mandate" not in receipt.model_dump()
    ledger.close_file()
