"""Private evaluation against a plain loop over units: bounds, noise, charges, and what the figures mean."""

import json
import math

import numpy as np
import pytest
import torch
from evaluations import alone, bounds_for
from silo_requests import COORDINATOR, TRUSTED, ask, ward

from federated.adapters.arrays import to_bytes
from federated.adapters.lora_factors import frozen_digest
from federated.adapters.warm_model import initial_adapter, warm_model
from federated.evaluation.private_sums import checked_sums, evaluated, figures, private_sums
from federated.protocol import silo_pb2 as pb
from federated.silo.silo import Silo
from privacy.ledger.replay import replay
from privacy.ledger.statements import RunStatement
from privacy.mechanism.noise import grid, noised_sums
from privacy.mechanism.streams import Streams
from privacy.plan import METRIC, MetricRelease, PlanTerms
from trainer.data.tokenizer import load_tokenizer
from trainer.models.adapters import Adaptation, trainable
from trainer.scoring.score import score
from trainer.tasks.task import Encoded
from trainer.tasks.text import CausalTask

NOISE = 3.0
PLAN = PlanTerms(
    sampling_rate=0.05,
    max_grad_norm=1.0,
    noise_multiplier=0.8,
    rounds=2,
    steps_per_round=2,
    delta=1e-5,
    metric_releases=(MetricRelease(name=METRIC, noise_multiplier=NOISE, releases=2),),
)
DIGEST = "ab" * 32
CONTEXT = 64
SENSITIVITY = 2.0  # of four values from 0 to 1


def streams(number):
    return Streams(number.to_bytes(32, "big"), DIGEST)


@pytest.fixture(scope="module")
def scored(tiny_model):
    """A model, its task, and units of many lengths."""
    task = CausalTask(load_tokenizer(tiny_model), CONTEXT)
    model = warm_model(tiny_model, Adaptation(4, 8.0)).eval()
    units = [task.encode("Return the number of items. " * count) for count in (1, 2, 40)]
    ids = list(units[0].ids)
    for _ in range(10):  # the model's own words: these it gets right
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return model, task, [*units, Encoded(tuple(ids), 40, truncated=False)]


def unit_by_unit(model, task, units):
    """Oracle: each unit alone, in plain floating point."""
    rows = []
    for unit in units:
        batch = task.collate([unit])
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"]).logits[0, : len(unit.ids) - 1].double()
        targets = torch.tensor(unit.ids[1:])
        nats = -torch.log_softmax(logits, dim=1)[torch.arange(len(targets)), targets].sum().item()
        rows.append([nats, unit.characters, (logits.argmax(dim=1) == targets).sum().item(), len(targets)])
    return np.array(rows)


def test_the_sums_are_those_of_a_loop_over_units(scored):
    model, task, units = scored
    bounds, plain = bounds_for(CONTEXT), unit_by_unit(*scored)
    expected = np.clip(plain / bounds.scale, 0, 1).sum(axis=0)
    found = private_sums(model, task, alone(units), [], bounds, 1e-9, streams(1))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    whole = score(model, task, units, 2)
    shown = figures([found], bounds, 1e-9)
    assert shown["bits_per_char"] == pytest.approx(whole.main, rel=1e-4)  # nothing was clipped
    assert shown["accuracy"] == pytest.approx(plain[:, 2].sum() / plain[:, 3].sum(), rel=1e-4)
    assert shown["accuracy"] > 0.01


def test_a_units_values_do_not_depend_on_the_others(scored):
    """Nor on how they are rounded beside others: the sensitivity is exact."""
    model, task, units = scored
    noiseless = [
        private_sums(model, task, alone(part), [], bounds_for(CONTEXT), 1e-30, streams(1))
        for part in (units, *map(list, zip(units)))
    ]
    assert noiseless[0] == pytest.approx(np.sum(noiseless[1:], axis=0), rel=0, abs=1e-12)


def test_adding_a_unit_moves_the_vector_by_no_more_than_the_sensitivity(scored):
    """Also one whose loss is beyond the bound, or is not a number."""
    model, _, units = scored

    class Broken(CausalTask):
        def record_scores(self, model, batch):
            found = super().record_scores(model, batch)
            found[0, 0] = self.loss
            return found

    for loss in (1e9, math.inf, math.nan, -5.0):
        task = Broken(load_tokenizer_of(scored), CONTEXT)
        task.loss = loss
        arguments = ([], bounds_for(CONTEXT), 1e-9, streams(1))
        moved = np.subtract(*(private_sums(model, task, alone(part), *arguments) for part in (units, units[:-1])))
        assert np.isfinite(moved).all()
        assert ((moved > -1e-6) & (moved < 1 + 1e-6)).all()
        assert np.linalg.norm(moved) <= SENSITIVITY


def load_tokenizer_of(scored):
    return scored[1]._tokenizer


def test_the_noise_has_the_plans_size_and_lies_on_the_public_grid():
    sums = np.array([10.0, 20.0, 30.0, 40.0])
    std = NOISE * SENSITIVITY
    draws = np.array([noised_sums(sums, std, streams(number), METRIC) for number in range(4000)]) - sums
    assert draws.std(axis=0) == pytest.approx(std, rel=0.05)
    assert np.abs(draws.mean(axis=0)).max() < 4 * std / math.sqrt(4000)
    correlation = np.corrcoef(draws.T) - np.eye(4)
    assert np.abs(correlation).max() < 0.08
    steps = (draws + sums) / grid(std)
    assert (steps == np.rint(steps)).all()
    # The noise of training under the same seed is another stream.
    drawn = [streams(1).generator(purpose, 0, METRIC).standard_normal(4) for purpose in ("metric", "noise")]
    assert not np.array_equal(*drawn)


def test_the_figures_errors_are_those_of_repeated_noise():
    bounds, silos, units = bounds_for(128), 3, np.array([200.0, 90.0, 40.0, 80.0])
    drawn = []
    for number in range(600):
        sums = [noised_sums(units, NOISE * SENSITIVITY, streams(10 * number + silo), METRIC) for silo in range(silos)]
        drawn.append(figures(sums, bounds, NOISE))
    for name in ("bits_per_char", "accuracy"):
        values = np.array([found[name] for found in drawn])
        assert values.std() == pytest.approx(np.median([found[f"{name}_error"] for found in drawn]), rel=0.15)


@pytest.mark.parametrize("labels", [(), ("yes", "no")])
@pytest.mark.parametrize("silos", [0, 1, 3])
def test_no_unit_gives_no_figure(silos, labels):
    bounds = bounds_for(128, labels)
    for noise in (0.0, NOISE):
        found = figures([[0.0] * bounds.num_sums] * silos, bounds, noise)
        by_label = found.pop("f1_by_label", {})
        assert set(found.values()) == {None}
        assert [set(one.values()) for one in by_label.values()] == [{None}] * len(labels)


def test_noise_alone_gives_no_figure():
    assert figures([[0.1, 0.2, 0.1, 0.2]], bounds_for(128), NOISE)["bits_per_char"] is None


@pytest.mark.parametrize("sums", [[], [1.0] * 3, [1.0, 2.0, 3.0, math.nan], [math.inf] * 4])
def test_sums_that_are_none_are_rejected(sums):
    with pytest.raises(ValueError, match="its sums are"):
        checked_sums(sums, bounds_for(128))


# In a silo


def silo_of(folder, model, rows, **policy):
    folder.mkdir(exist_ok=True)
    budget = {"budget_epsilon": 30.0, "max_epsilon_per_run": 20.0}
    return Silo(ward(folder, model, rows, **{**budget, **policy}), TRUSTED, bytes(range(32)))


@pytest.fixture
def silo(tmp_path, tiny_model):
    silo = silo_of(tmp_path / "silo", tiny_model, 120, releases_metrics=True)
    yield silo
    silo.close()


@pytest.fixture(scope="module")
def adapter(tiny_run):
    return to_bytes(initial_adapter(tiny_run.config(), tiny_run.model))


def evaluate(silo, adapter, number=1, request_id=None, **changes):
    values = {
        "number": number,
        "metric": METRIC,
        "plan_digest": PLAN.digest,
        "base_model_digest": silo.workbench.base_model.content_digest,
        "task": "causal",
        "adapter_spec": pb.AdapterSpec(rank=4, alpha=8.0),
        "adapter": adapter,
    }
    return ask(silo, request_id or f"evaluation-{number}", evaluate=pb.Evaluate(**{**values, **changes}))[0]


def reserve(silo):
    return ask(silo, "reserve", reserve=pb.Reserve(plan=PLAN.model_dump_json()))[0]


def bodies(silo):
    return [json.loads(entry["body"]) for entry in silo.ledger.entries()]


def test_an_evaluation_is_charged_once_and_replayed(silo, adapter):
    reserve(silo)
    first = evaluate(silo, adapter)
    assert len(first.evaluated.sums) == 4
    assert evaluate(silo, adapter) == first
    assert evaluate(silo, b"", number=2).WhichOneof("kind") == "evaluated"  # the base model alone
    for number, rule in ((3, "schedule"), (0, "schedule"), (1, "schedule")):
        assert evaluate(silo, adapter, number, request_id=f"another-{number}").refusal.rule == rule
    ask(silo, "close", close=pb.Close())
    assert evaluate(silo, adapter, number=2, request_id="late").refusal.rule == "closed"
    entries = bodies(silo)
    charges = [(body["metric"], body["metric_number"], body["round"]) for body in entries if body["kind"] == "charge"]
    assert charges == [(METRIC, 1, 0), (METRIC, 2, 0)]
    replay(entries, "test")
    closed = ask(silo, "close", close=pb.Close())[0].closed
    assert RunStatement.from_bytes(closed.statement, "test").rounds_charged == 0


def test_an_evaluation_of_the_base_model_leaves_a_frozen_a_frozen(silo, tiny_model):
    """Before: A trained after it, and what came next was refused by every run that shares the model."""
    model = warm_model(tiny_model, Adaptation(4, 8.0), "", 7)
    digest = frozen_digest({name: value.detach().numpy() for name, value in model.named_parameters()})
    spec = pb.AdapterSpec(rank=4, alpha=8.0, frozen_seed=7, frozen_digest=digest)
    adapter = to_bytes({name: value.detach().numpy().copy() for name, value in trainable(model).items()})
    reserve(silo)
    for number, given in ((1, b""), (2, adapter)):
        assert evaluate(silo, given, number, adapter_spec=spec).WhichOneof("kind") == "evaluated"
    before = trainable(model).keys()
    with pytest.raises(RuntimeError), evaluated(model, None):
        raise RuntimeError
    assert trainable(model).keys() == before


def test_the_replay_finds_an_evaluation_that_no_plan_covers(silo, adapter):
    reserve(silo)
    evaluate(silo, adapter)
    from configs.errors import InputError

    for changes in ({"metric_number": 3}, {"metric": "other"}):
        changed = [body | changes if body["kind"] == "charge" else body for body in bodies(silo)]
        with pytest.raises(InputError, match="a charge that no reservation covers"):
            replay(changed, "test")


def test_its_noise_is_paid_for(silo):
    """The reservation is what dp-accounting says of both kinds of release together."""
    from dp_accounting import ComposedDpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant

    training = SelfComposedDpEvent(PoissonSampledDpEvent(0.05, GaussianDpEvent(0.8)), 4)
    event = ComposedDpEvent([training, SelfComposedDpEvent(GaussianDpEvent(NOISE), 2)])
    expected = PLDAccountant().compose(event).get_epsilon(1e-5)
    reserve(silo)
    assert silo.ledger.reservation("run-1", COORDINATOR.public_key)["epsilon"] == pytest.approx(expected, rel=1e-3)
    assert expected > PLAN.model_copy(update={"metric_releases": ()}).epsilon


def test_what_the_policy_and_the_plan_do_not_have_is_refused(silo, adapter, tmp_path, tiny_model):
    assert evaluate(silo, adapter).refusal.rule == "reservation"
    reserve(silo)
    assert evaluate(silo, adapter, metric="losses").refusal.rule == "metric"
    assert evaluate(silo, adapter, metric="").refusal.rule == "metric"
    assert evaluate(silo, adapter, base_model_digest="00").refusal.rule == "base_model"
    assert evaluate(silo, adapter, adapter_spec=pb.AdapterSpec(rank=8, alpha=8.0)).refusal.rule == "adapter"
    assert evaluate(silo, adapter, plan_digest="").refusal.rule == "reservation"
    assert "charge" not in [body["kind"] for body in bodies(silo)]
    closed = silo_of(tmp_path / "closed", tiny_model, 120)
    assert reserve(closed).refusal.rule == "metric_releases"
    closed.close()


def test_training_units_are_not_read(tmp_path, tiny_model, adapter, silo):
    """The same held-out units beside other training units: the same sums, bit for bit."""
    reserve(silo)
    first = evaluate(silo, adapter)
    silo.close()
    (tmp_path / "other" / "state").mkdir(parents=True)
    key = (tmp_path / "silo" / "state" / "split.key").read_bytes()
    (tmp_path / "other" / "state" / "split.key").touch(mode=0o600)
    (tmp_path / "other" / "state" / "split.key").write_bytes(key)
    other = silo_of(tmp_path / "other", tiny_model, 120, releases_metrics=True)
    units = other.workbench._units
    other.workbench._units = type(units)((({"text": "another text"},),), units.held_out, units.counts)
    reserve(other)
    assert list(evaluate(other, adapter).evaluated.sums) == list(first.evaluated.sums)
    other.close()


def test_a_trained_adapter_and_the_base_model_score_differently(silo, adapter, tiny_run):
    reserve(silo)
    start = initial_adapter(tiny_run.config(), tiny_run.model)
    changed = to_bytes({name: array + np.float32(0.05) for name, array in start.items()})
    with_adapter = evaluate(silo, changed, 1).evaluated.sums
    base = evaluate(silo, b"", 2).evaluated.sums
    assert with_adapter[0] != base[0]
