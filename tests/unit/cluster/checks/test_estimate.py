"""What a plan is said to cost."""

from cluster.checks.estimate import estimate
from configs.load import load


def test_a_plan_that_spends_nothing_has_no_number_of_runs():
    found = estimate(load("tiny", ["privacy.sampling_rate=1e-6"]))["privacy"]
    assert found["epsilon"] == 0
    assert {silo["runs_in_budget"] for silo in found["silos"].values()} == {None}
