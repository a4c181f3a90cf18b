"""The trusted aggregator: its ledger before its noise, what a kill leaves, what settings and rounds are refused."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from client_plans import client_plan
from repository import REPOSITORY, SUPPORT

from configs.errors import InputError, PolicyRefusal, SiloweaveError
from configs.load import load
from configs.schema.federated import FederatedSettings
from configs.schema.rounds.privacy import PrivacySettings
from federated.adapters.arrays import to_bytes
from federated.aggregation.aggregation import RoundAggregation
from federated.coordinator.parties import Parties
from federated.coordinator.trusted_aggregator import TrustedAggregator, new_aggregator, open_ledger
from federated.identity.trust import coordinator_signer
from privacy.ledger.chain import verify_entries
from privacy.ledger.replay import replay
from privacy.mechanism.client_sum import ClippedSum
from privacy.mechanism.streams import injected_seeds
from privacy.plan import PlanTerms
from privacy.plan_from_settings import plan_terms

C, CLIENTS = 1.0, 4
REQUEST = client_plan(max_grad_norm=C, noise_multiplier=2.5, rounds=2, num_clients=CLIENTS)
PLAN = REQUEST.for_clients()
RECORDS = PlanTerms(
    sampling_rate=0.01, max_grad_norm=1.0, noise_multiplier=5.0, rounds=1, steps_per_round=1, delta=1e-6
)
TEMPLATE = {"layer.lora_B.default.weight": np.zeros((6, 3), np.float32)}
PRIVACY = PrivacySettings(budget_epsilon=20.0, budget_delta=1e-4)
INPUTS = {"adapter": "ab" * 32}
SEED = bytes(range(32))


def opened(folder, **options):
    return open_ledger(folder, folder / "ledger", "members", PRIVACY, injected_seeds(SEED, "x"), **options)


def asks(total, answers=("north", "south", "west")):
    """Folds fixed updates in, as the exchange would."""

    def ask():
        for number, client in enumerate(answers, 1):
            total.add(client, {name: np.full_like(array, 0.01 * number) for name, array in TEMPLATE.items()})
        return sorted(answers)

    return ask


def run_round(aggregator, number=1, inputs=INPUTS, **options):
    total = ClippedSum(TEMPLATE, PLAN)
    return aggregator.round(number, inputs, asks(total, **options), total.noised_mean)


def kinds(ledger):
    return [json.loads(entry["body"])["kind"] for entry in ledger.entries()]


def test_a_round_is_charged_before_it_is_asked_for_and_stored_before_it_is_used(tmp_path):
    ledger = opened(tmp_path)
    aggregator, seen = TrustedAggregator(ledger, "run-1", PLAN), []
    assert kinds(ledger) == ["open", "reserve"]
    total = ClippedSum(TEMPLATE, PLAN)

    def ask():
        seen.append(kinds(ledger))
        return asks(total)()

    first = aggregator.round(1, INPUTS, ask, total.noised_mean)
    assert seen == [["open", "reserve", "charge"]]
    assert kinds(ledger) == ["open", "reserve", "charge", "release"]
    assert first.answered == ["north", "south", "west"]
    again = aggregator.round(1, INPUTS, lambda: pytest.fail("asked twice"), ClippedSum(TEMPLATE, PLAN).noised_mean)
    assert to_bytes(again.mean) == to_bytes(first.mean)
    with pytest.raises(PolicyRefusal, match="request_id"):
        run_round(aggregator, inputs={"adapter": "cd" * 32})
    with pytest.raises(PolicyRefusal, match="schedule"):
        run_round(aggregator, number=3)
    facts = aggregator.close()
    assert facts["public_key"] == coordinator_signer(tmp_path).public_key
    assert facts["statement"]["rounds_charged"] == 1
    with pytest.raises(PolicyRefusal, match="closed"):
        run_round(aggregator, number=2)
    replay(verify_entries(ledger.entries(), "test"), "test")


def test_a_round_that_too_few_answer_is_abandoned_and_stays_charged(tmp_path):
    """Asked again it is the same charge: nothing of the first time was released, and it is released once."""
    ledger = opened(tmp_path)
    aggregator = TrustedAggregator(ledger, "run-1", PLAN)

    def too_few():
        raise SiloweaveError("1 of 4 silos answered")

    with pytest.raises(SiloweaveError, match="1 of 4"):
        aggregator.round(1, INPUTS, too_few, ClippedSum(TEMPLATE, PLAN).noised_mean)
    assert kinds(ledger) == ["open", "reserve", "charge"]
    assert ledger.left().epsilon == pytest.approx(20 - REQUEST.epsilon)
    run_round(aggregator)
    assert kinds(ledger) == ["open", "reserve", "charge", "release"]
    assert ledger.left().epsilon == pytest.approx(20 - REQUEST.epsilon)


KILLED = """
import os, signal, sys
sys.path[:0] = {tests!r}
from pathlib import Path
from privacy.ledger.ledger import Ledger
import test_trusted_aggregator as t

die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
ledger = t.opened(Path({folder!r}))
aggregator = t.TrustedAggregator(ledger, "run-1", t.PLAN)
if {at!r} == "charged":
    t.asks = lambda *_, **__: die
elif {at!r} == "folded":
    ledger.release = die
t.run_round(aggregator)
die()  # released, and not committed
"""


@pytest.mark.parametrize("at", ["charged", "folded", "released"])
def test_killed_between_charge_and_commit_it_resumes_to_the_same_bytes(tmp_path, at):
    whole = run_round(TrustedAggregator(opened(tmp_path / "whole"), "run-1", PLAN))
    folder = tmp_path / "killed"
    script = KILLED.format(tests=[str(Path(__file__).parent), str(SUPPORT), str(REPOSITORY)], folder=str(folder), at=at)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    ledger = opened(folder)
    released = ["release"] if at == "released" else []
    assert kinds(ledger) == ["open", "reserve", "charge", *released]
    resumed = run_round(TrustedAggregator(ledger, "run-1", PLAN))
    assert to_bytes(resumed.mean) == to_bytes(whole.mean)
    assert kinds(ledger) == ["open", "reserve", "charge", "release"]


def test_the_clients_budget_is_one_for_all_runs(tmp_path):
    ledger = opened(tmp_path)
    runs = int(20 / REQUEST.epsilon)
    for number in range(runs):
        TrustedAggregator(ledger, f"run-{number}", PLAN)
    with pytest.raises(PolicyRefusal, match="budget_epsilon"):
        TrustedAggregator(ledger, "one-more", PLAN)
    with pytest.raises(PolicyRefusal, match="unit: this ledger is of another unit"):
        ledger.reserve("records", RECORDS.bind(100))
    ledger.close_file()
    other = tmp_path / "other.key"
    other.write_bytes(bytes(32))
    other.chmod(0o600)
    (tmp_path / "ledger" / "silo.key").unlink()
    (tmp_path / "ledger" / "silo.key").symlink_to(other)
    with pytest.raises(InputError):
        opened(tmp_path)


@pytest.mark.parametrize(("sigma", "rounds"), [(1.0, 1), (2.5, 2), (4.0, 30)])
def test_epsilon_is_that_of_composed_gaussians_by_dp_accounting(sigma, rounds):
    """A zero-out of one client moves the sum by C at most: Gaussian rounds, together one of sigma / sqrt(rounds)."""
    from dp_accounting.pld import privacy_loss_distribution as pld
    from scipy.stats import norm

    request = REQUEST.model_copy(update={"noise_multiplier": sigma, "rounds": rounds})
    composed = sigma / math.sqrt(rounds)
    oracle = pld.from_gaussian_mechanism(composed, value_discretization_interval=1e-4).get_epsilon_for_delta(1e-5)
    assert request.epsilon == pytest.approx(oracle, rel=1e-3)
    epsilon = request.epsilon  # and Balle and Wang 2018, in closed form
    half, shift = 0.5 / composed, epsilon * composed
    delta = norm.cdf(half - shift) - math.exp(epsilon) * norm.cdf(-half - shift)
    assert delta == pytest.approx(1e-5, rel=0.05)
    assert delta <= 1e-5


def test_nothing_without_noise_can_be_taken_out_of_the_aggregation():
    settings = FederatedSettings(lora_rank=3)
    adapter = {**TEMPLATE, "layer.lora_A.default.weight": np.ones((3, 5), np.float32)}
    aggregation = RoundAggregation(settings, adapter, {}, CLIENTS, PLAN)
    aggregation.add("north", adapter)
    assert aggregation.clipped_sum.count == 1
    with pytest.raises(TypeError, match="nothing without noise"):
        aggregation.result()


CLIENT = ("privacy.unit=client", "privacy.num_clients=5", "evaluate.without_dp=false")


def test_settings_become_a_plan_with_clients_as_units(tmp_path):
    plan = plan_terms(load("tiny", CLIENT))
    assert (plan.unit, plan.relation, plan.sampler, plan.sampling_rate) == ("client", "zero_out", "all", 1)
    assert (plan.num_clients, plan.steps_per_round, plan.rounds) == (5, 1, 2)
    assert 0.99 * 8 < plan.epsilon <= 8
    parties = Parties(coordinator_signer(tmp_path), 6)
    with pytest.raises(InputError, match=r"privacy.num_clients is 5: there are 6 silos"):
        new_aggregator(parties, "run-1", plan)
    with pytest.raises(InputError, match="this coordinator has no ledger"):
        new_aggregator(Parties(parties.signer, 5), "run-1", plan)
    assert new_aggregator(parties, "run-1", plan_terms(load("tiny"))) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["federated.aggregation=median", "federated.min_silos=3"], r"aggregation is 'median' with .*only their sum"),
        (["federated.aggregation=scaffold", "federated.optimizer=sgd"], "federated.aggregation is 'scaffold' with"),
        (["federated.adapters=product"], "federated.adapters is 'product' with"),
        (["federated.enough_silos=2"], "one client's speed would decide whether another one counts; give 0"),
        (["federated.optimizer=adam_bc"], "federated.optimizer is 'adam_bc' with"),
        (["privacy.sampler=truncated_poisson", "privacy.max_batch_size=100"], "sampler is 'truncated_poisson' with"),
        (["privacy.clipping_function=automatic"], "privacy.clipping_function is 'automatic' with"),
        (["privacy.evaluations=1"], "privacy.evaluations is 1 with"),
        (["evaluate.without_dp=true"], "evaluate.without_dp is True with"),
        (["privacy.num_clients=0"], r"privacy.num_clients is 0: .*give federated.min_silos \(1\) to 10000"),
        (["privacy.num_clients=2", "federated.min_silos=3"], "privacy.num_clients is 2"),
        (["privacy.num_clients=70000", "privacy.delta=1e-7"], "to 65536"),
        (["privacy.unit=record"], "privacy.num_clients is 5: give 0 with privacy.unit 'record'"),
    ],
)  # fmt: skip
def test_what_an_aggregator_cannot_do_is_refused_in_one_line(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        load("tiny", [*CLIENT, *changes])
    assert "\n" not in str(caught.value)


def test_plans_that_no_aggregator_carries_out_are_refused():
    with pytest.raises(PolicyRefusal, match="clipping_function"):
        REQUEST.model_copy(update={"clipping_function": "automatic"}).for_clients()
    metrics = [{"name": "held_out", "noise_multiplier": 5.0, "releases": 1}]
    with pytest.raises(PolicyRefusal, match="metric_releases"):
        PlanTerms(**{**REQUEST.model_dump(), "metric_releases": metrics}).for_clients()
    with pytest.raises(PolicyRefusal, match="unit"):
        RECORDS.for_clients()


def test_an_audit_and_a_search_are_about_records():
    from cluster.checks.audit import audit
    from cluster.tuning.trial_kinds import check_budget

    run = SimpleNamespace(config=load("tiny", CLIENT))
    for refused in (lambda: audit(run, 500), lambda: check_budget(run, [])):
        with pytest.raises(InputError, match=r"privacy.unit is 'client'"):
            refused()
