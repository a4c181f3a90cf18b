"""Private evaluation of what a model writes: bounds, an oracle that shares no line with it, noise, policy, charge."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chat_templates import small_decoder, tokenizer_of
from hypothesis import given
from hypothesis import strategies as st
from silo_requests import TRUSTED, ask, ward

from configs.errors import InputError
from configs.load import load
from configs.parse import parse
from configs.schema.silo import SiloConfig, SiloPolicy
from configs.schema.tasks import TaskSpec
from configs.storage.manifests import Manifest, commit_manifest
from federated.evaluation.private_sums import bounds_of, figures, private_sums
from federated.protocol import silo_pb2 as pb
from federated.silo.silo import Silo
from privacy.certificate.certificate import CERTIFICATE_VERSION, _left_each_silo
from privacy.mechanism.noise import noised_sums
from privacy.mechanism.streams import Streams
from privacy.plan import METRIC, MetricRelease, PlanTerms
from privacy.plan_from_settings import plan_terms
from trainer.data.tokenizer import load_tokenizer
from trainer.models.load import load_model
from trainer.tasks.task import kind_of

CONTEXT, WRITTEN, NOISE = 64, 6, 2.0
SPEC = TaskSpec(name="translation")
BASE = SimpleNamespace(metadata={"context_length": CONTEXT})
BOUNDS = bounds_of(BASE, SPEC, (), WRITTEN)
PLAN = PlanTerms(
    sampling_rate=0.1, max_grad_norm=1.0, noise_multiplier=0.8, rounds=1, steps_per_round=2, delta=1e-5,
    metric_releases=(MetricRelease(name=METRIC, releases=1, noise_multiplier=NOISE, max_new_tokens=WRITTEN),),
)  # fmt: skip
ROWS = [
    {"source": f"What is number {number}?", "target": f"It is a {'small ' * (number % 3)}number."}
    for number in range(40)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer_of(folder)
    model = small_decoder()
    task = kind_of("translation")(load_tokenizer(folder), CONTEXT, SPEC)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):  # so that what it writes has something in common with what is right
        optimizer.zero_grad()
        task.record_losses(model, task.collate(task.examples(ROWS))).sum().backward()
        optimizer.step()
    model.save_pretrained(folder)
    commit_manifest(folder, Manifest("model", "", metadata={"context_length": CONTEXT, "trained_on": "public"}))
    return folder


@pytest.fixture(scope="module")
def task(folder):
    return kind_of("translation")(load_tokenizer(folder), CONTEXT, SPEC)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder).eval()


def streams(number=1):
    return Streams(number.to_bytes(32, "big"), "ab" * 32)


def sums(model, task, units, noise=1e-12, number=1):
    return np.array(private_sums(model, task, units, [], BOUNDS, noise, streams(number)))


def by_hand(model, task, row):
    """chrF of a greedy answer by sacrebleu, token by token without a cache, from tokens put together here."""
    sacrebleu, tokenizer = pytest.importorskip("sacrebleu"), task._tokenizer
    read = [0, *tokenizer.encode(f"{row['source']}\n\n", add_special_tokens=False)]
    written = []
    while len(written) < WRITTEN:
        written.append(int(model(input_ids=torch.tensor([read + written])).logits[0, -1].argmax()))
    written = written[: written.index(0)] if 0 in written else written
    return sacrebleu.sentence_chrf(tokenizer.decode(written).strip(), [row["target"]]).score / 100


def test_the_sum_is_that_of_a_loop_over_records(model, task):
    units = [task.scored([row]) for row in ROWS]
    expected = [by_hand(model, task, row) for row in ROWS]
    assert 0.05 < np.mean(expected) < 0.95
    found = sums(model, task, units)
    assert len(found) == 4
    assert found[3] == pytest.approx(sum(expected), abs=1e-4)
    shown = figures([found.tolist()], BOUNDS, 0.0)
    assert shown["answer_chrf"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert shown.keys() == {"nats_per_token", "accuracy", "answer_chrf"}


def test_a_units_value_does_not_depend_on_the_others_and_is_the_mean_over_its_records(model, task):
    units = [task.scored(ROWS[:1]), task.scored(ROWS[1:4]), ()]
    alone = [sums(model, task, [unit]) for unit in units]
    assert sums(model, task, units) == pytest.approx(np.sum(alone, axis=0), rel=0, abs=1e-9)
    assert alone[1][3] == pytest.approx(np.mean([by_hand(model, task, row) for row in ROWS[1:4]]), abs=1e-5)
    assert alone[2].tolist() == pytest.approx([0.0] * 4, abs=1e-9)


words = st.text(max_size=20)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=4), st.floats(allow_nan=True))
def test_no_unit_moves_the_sums_by_more_than_the_sensitivity(pairs, nats):
    """Whatever is written, right, or not a number."""

    class Anything(kind_of("translation")):
        def __init__(self):
            self.measures = self.measured(SPEC, CONTEXT)

        def record_scores(self, _model, _examples):
            return torch.tensor([[nats, 1.0, 1.0]], dtype=torch.float64)

        def _written(self, _model, example, _most, ends, how):
            assert not ends
            assert (how["num_beams"], how["repetition_penalty"], how["do_sample"]) == (1, 1.0, False)
            return example[0]

        def references(self, examples):
            return [right for _, right in examples]

    moved = sums(None, Anything(), [pairs])
    assert ((moved >= -1e-9) & (moved <= 1 + 1e-9)).all()
    assert np.linalg.norm(moved) <= BOUNDS.sensitivity + 1e-9
    assert BOUNDS.sensitivity == 2.0  # of four values from 0 to 1


def test_the_stated_error_covers_the_exact_figure(model, task):
    """In at least 90 of 100 evaluations of 3 silos it is within two standard errors, and not in all by far too much."""
    exact = sums(model, task, [task.scored([row]) for row in ROWS]) * 10
    truth = figures([exact.tolist()], BOUNDS, 0.0)["answer_chrf"]
    distances = []
    for number in range(100):
        charges = [streams(3 * number + silo) for silo in range(3)]
        noised = [noised_sums(exact / 3, NOISE * BOUNDS.sensitivity, charge, METRIC).tolist() for charge in charges]
        found = figures(noised, BOUNDS, NOISE)
        distances.append(abs(found["answer_chrf"] - truth) / found["answer_chrf_error"])
    assert sum(distance <= 2 for distance in distances) >= 90
    assert sum(distance <= 0.5 for distance in distances) <= 60


# In a silo


def settings(folder, model, **policy):
    given = ward(folder, model, tasks=["translation"], releases_metrics=True, **policy).model_dump()
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * 3))
    return SiloConfig(**given)


def reserve(silo):
    return ask(silo, "reserve", reserve=pb.Reserve(plan=PLAN.model_dump_json()))[0]


def test_a_silo_writes_where_its_steward_allows_it_and_is_charged_as_before(tmp_path, folder, model, task):
    silo = Silo(settings(tmp_path, folder, max_new_tokens=WRITTEN), TRUSTED, bytes(range(32)))
    reserved = silo.ledger
    assert reserve(silo).WhichOneof("kind") == "reserved"
    asked = pb.Evaluate(
        number=1, metric=METRIC, plan_digest=PLAN.digest, task="translation",
        base_model_digest=silo.workbench.base_model.content_digest, adapter_spec=pb.AdapterSpec(rank=2, alpha=4.0),
    )  # fmt: skip
    found = list(ask(silo, "evaluation", evaluate=asked)[0].evaluated.sums)
    exact = sums(model, task, silo.workbench.held_out)
    assert len(found) == 4
    assert np.abs(np.array(found) - exact).max() < 6 * NOISE * BOUNDS.sensitivity
    kinds = [json.loads(entry["body"])["kind"] for entry in reserved.entries()]
    assert kinds.count("charge") == 1
    # The accounting is relative to the sensitivity: the same epsilon as without.
    without = PLAN.model_copy(
        update={"metric_releases": (MetricRelease(name=METRIC, releases=1, noise_multiplier=2.0),)}
    )
    assert PLAN.epsilon == without.epsilon
    assert PLAN.digest != without.digest
    assert "max_new_tokens" not in without.model_dump_json()
    silo.close()


@pytest.mark.parametrize("allowed", [0, WRITTEN - 1])
def test_a_silo_refuses_to_write_more_than_its_steward_allows(tmp_path, folder, allowed):
    silo = Silo(settings(tmp_path, folder, max_new_tokens=allowed), TRUSTED, bytes(range(32)))
    refusal = reserve(silo).refusal
    assert (refusal.rule, refusal.asked, refusal.allowed) == ("max_new_tokens", str(WRITTEN), str(allowed))
    assert not [entry for entry in silo.ledger.entries() if json.loads(entry["body"])["kind"] == "reserve"]
    silo.close()


def test_the_certificate_says_that_it_left():
    assert _left_each_silo(PLAN, CERTIFICATE_VERSION).endswith(
        "of the metric held_out with what answers of up to 6 tokens have in common with the right ones"
    )


# In settings


def test_a_runs_settings_are_in_its_plan_alone_where_they_are_given():
    run = ["federated.task=translation", "privacy.evaluations=1"]
    given = plan_terms(load("tiny", [*run, "privacy.evaluation_max_new_tokens=5"]))
    assert given.metric_releases[0].max_new_tokens == 5
    assert "max_new_tokens" not in plan_terms(load("tiny", run)).model_dump_json()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["privacy.evaluations=1"], "the answer of the task 'causal' is no text that is written; leave it out"),
        (["federated.task=chat"], "privacy.evaluations is 0: nothing would be evaluated"),
    ],
)
def test_what_would_be_read_by_nothing_is_refused_in_one_line(settings, message):
    with pytest.raises(InputError, match=f"privacy.evaluation_max_new_tokens is 5.*{message}") as refused:
        load("tiny", ["privacy.evaluation_max_new_tokens=5", *settings])
    assert "\n" not in str(refused.value)


def test_a_policy_of_another_task_that_would_write_is_refused():
    tree = {"budget_epsilon": 1.0, "budget_delta": 1e-5, "max_new_tokens": 5}
    with pytest.raises(InputError, match=r"policy.max_new_tokens is 5: the answer of the task 'causal' is no text"):
        parse(SiloPolicy, tree, "silo.toml")
