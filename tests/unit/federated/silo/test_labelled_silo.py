"""A silo whose records have labels: what it takes in a request, what it trains on, and what it says at its start."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from silo_requests import TRUSTED, ask, ward

from configs.errors import InputError
from federated.adapters.arrays import from_bytes, to_bytes
from federated.adapters.warm_model import adaptation, initial_adapter
from federated.protocol import silo_pb2 as pb
from federated.silo.silo import Silo
from privacy.plan import METRIC, MetricRelease, PlanTerms
from trainer.models.adapters import adapted, adapter_weights
from trainer.models.load import load_model
from trainer.tasks.task import task_of

LABELS = ("calm", "urgent")
MESSAGES = {
    "train": (pb.Train, {"round": 1, "learning_rate": 0.01, "optimizer": "sgd"}),
    "evaluate": (pb.Evaluate, {"number": 1, "metric": METRIC}),
}
PLAN = PlanTerms(
    sampling_rate=0.05,
    max_grad_norm=1.0,
    noise_multiplier=0.8,
    rounds=2,
    steps_per_round=2,
    delta=1e-5,
    metric_releases=(MetricRelease(name=METRIC, noise_multiplier=3.0, releases=1),),
)
ROWS = [
    {"patient": f"p{number // 3}", "note": f"note {number} of the ward", "triage": ("ruhig", "urgent")[number % 2]}
    for number in range(180)
]


def settings(folder, model, rows=ROWS, **policy):
    """The ward, with labels beside its notes."""
    given = {"budget_epsilon": 100.0, "budget_delta": 1e-3, "max_epsilon_per_run": 50.0, "releases_metrics": True}
    config = ward(folder, model, **{**given, "tasks": ["classification"], "labels": LABELS, **policy})
    Path(config.data.source).write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = {"text": "note", "unit": "patient", "columns": {"label": "triage"}, "labels": {"ruhig": "calm"}}
    return config.model_copy(update={"data": config.data.model_copy(update=named)})


@pytest.fixture(scope="module")
def silo(tmp_path_factory, tiny_model):
    silo = Silo(settings(tmp_path_factory.mktemp("silo"), tiny_model), TRUSTED, bytes(range(32)))
    ask(silo, "reserve", reserve=pb.Reserve(plan=PLAN.model_dump_json()))
    yield silo
    silo.close()


@pytest.fixture(scope="module")
def config(tiny_run):
    return tiny_run.config('federated.task="classification"', f"federated.labels={json.dumps(LABELS)}")


@pytest.fixture(scope="module")
def adapter(config, tiny_model):
    return initial_adapter(config, tiny_model)


def asked(silo, adapter, spec=None, **changes):
    return {
        "plan_digest": PLAN.digest,
        "base_model_digest": silo.workbench.base_model.content_digest,
        "task": "classification",
        "task_spec": pb.TaskSpec(labels=LABELS) if spec is None else spec,
        "adapter_spec": pb.AdapterSpec(rank=4, alpha=8.0),
        "adapter": to_bytes(adapter),
        **changes,
    }


def kinds(silo):
    return [json.loads(entry["body"])["kind"] for entry in silo.ledger.entries()]


@pytest.mark.parametrize(
    ("changes", "rule", "said"),
    [
        ({"task": "causal"}, "task", "classification"),
        ({"task": "multilabel"}, "task", "classification"),
        ({"spec": pb.TaskSpec()}, "labels", "calm, urgent"),
        ({"spec": pb.TaskSpec(labels=["urgent", "calm"])}, "labels", "calm, urgent"),
        ({"spec": pb.TaskSpec(labels=[*LABELS, "other"])}, "labels", "calm, urgent"),
        ({"spec": pb.TaskSpec(labels=["x"] * 301)}, "labels", "at most 300"),
        ({"spec": pb.TaskSpec(labels=LABELS, template="{note} {name}")}, "template", "none"),
        ({"spec": pb.TaskSpec(labels=LABELS, template="x" * 2001)}, "template", "at most 2000"),
        ({"spec": pb.TaskSpec(labels=LABELS, pooling="mean")}, "pooling", "model"),
        ({"spec": pb.TaskSpec(labels=LABELS, pooling="max")}, "pooling", "model"),
    ],
)
def test_other_words_than_the_policys_are_refused_before_any_charge(silo, adapter, changes, rule, said):
    before = kinds(silo)
    for kind in ("train", "evaluate"):
        more = (
            {"round": 1, "learning_rate": 0.01, "optimizer": "sgd"}
            if kind == "train"
            else {"number": 1, "metric": METRIC}
        )
        message = {"train": pb.Train, "evaluate": pb.Evaluate}[kind]
        refusal = ask(silo, "refused", **{kind: message(**asked(silo, adapter, **changes), **more)})[0].refusal
        assert (refusal.rule, said in refusal.allowed) == (rule, True)
    assert kinds(silo) == before


def test_adapter_and_head_travel_and_a_private_evaluation_counts_labels(silo, adapter, config):
    (head,) = {name for name in adapter if "lora" not in name}
    assert adapter[head].shape == (len(LABELS), config.model.hidden_size)
    train = pb.Train(**asked(silo, adapter), round=1, learning_rate=0.01, optimizer="sgd")
    update = from_bytes(ask(silo, "round-1", train=train)[0].trained.update)
    assert {name: value.shape for name, value in update.items()} == {n: v.shape for n, v in adapter.items()}
    assert np.abs(update[head]).max() > 0
    evaluate = pb.Evaluate(**asked(silo, adapter), number=1, metric=METRIC)
    assert len(ask(silo, "evaluation", evaluate=evaluate)[0].evaluated.sums) == 3 + 3 * len(LABELS)


def test_labels_by_likelihood_travel_without_a_head(tmp_path, tiny_model, tiny_run):
    given = {"pooling": "likelihood", "template": "{text}\nTriage:"}
    likely = [f"federated.{name}={json.dumps(value)}" for name, value in given.items()]
    labels = f"federated.labels={json.dumps(LABELS)}"
    adapter = initial_adapter(tiny_run.config('federated.task="classification"', labels, *likely), tiny_model)
    assert all("lora" in name for name in adapter)
    silo = Silo(settings(tmp_path, tiny_model, **given), TRUSTED, bytes(range(32)))
    try:
        ask(silo, "reserve", reserve=pb.Reserve(plan=PLAN.model_dump_json()))
        steps = {"round": 1, "learning_rate": 0.01, "optimizer": "sgd"}
        with_head = asked(silo, adapter, pb.TaskSpec(labels=LABELS, template=given["template"]))
        assert ask(silo, "head", train=pb.Train(**with_head, **steps))[0].refusal.rule == "pooling"
        fields = asked(silo, adapter, pb.TaskSpec(labels=LABELS, **given))
        update = from_bytes(ask(silo, "round-1", train=pb.Train(**fields, **steps))[0].trained.update)
        assert any(array.any() for array in update.values())
        evaluate = pb.Evaluate(**fields, number=1, metric=METRIC)
        assert len(ask(silo, "evaluation", evaluate=evaluate)[0].evaluated.sums) == 3 + 3 * len(LABELS)
        assert kinds(silo).count("charge") == 2
    finally:
        silo.close()


def test_a_policy_that_has_changed_since_the_records_were_read_counts_from_the_next_start_on(silo, config, adapter):
    before, others = silo.config, ("urgent", "calm")
    policy = before.policy.model_copy(update={"labels": others})
    silo.config = before.model_copy(update={"policy": policy})
    train = pb.Train(**asked(silo, adapter, pb.TaskSpec(labels=others)), round=2, learning_rate=0.01, optimizer="sgd")
    charged = kinds(silo)
    refusal = ask(silo, "round-2", train=train)[0].refusal
    silo.config = before
    assert (refusal.rule, "when this silo started" in refusal.allowed) == ("task", True)
    assert kinds(silo) == charged


def test_a_persons_records_are_one_unit_of_several_examples(silo):
    units = silo.workbench.records
    assert len(units) + len(silo.workbench.held_out) == 60
    assert {len(unit) for unit in units} == {3}
    assert {example.target for unit in units for example in unit} == {(0,), (1,)}


def test_an_adapter_of_another_number_of_labels_is_refused(silo, config, tiny_model):
    other = config.model_copy(update={"federated": config.federated.model_copy(update={"labels": ("a", "b", "c")})})
    train = pb.Train(**asked(silo, initial_adapter(other, tiny_model)), round=1, learning_rate=0.01, optimizer="sgd")
    assert ask(silo, "refused", train=train)[0].refusal.rule == "adapter"


def test_the_head_that_a_silo_puts_on_is_the_coordinators(config, adapter, tiny_model):
    head = task_of(config.federated.task_spec, tiny_model).head
    ours = adapter_weights(
        adapted(load_model(tiny_model, head=head), adaptation(config.federated, head), config.run.seed)
    )
    assert all(np.array_equal(ours[name].numpy(), value) for name, value in adapter.items())


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"patient": "x", "note": "n", "triage": "eilig"},
            "line 181: column 'triage' holds 'eilig', which is none of the 2",
        ),
        ({"patient": "x", "note": "n"}, "line 181: no column 'triage'"),
        ({"patient": "x", "note": "n", "triage": None}, "line 181: the label column 'triage' holds nothing"),
    ],
)
def test_a_record_without_a_place_is_named_at_the_start_and_nothing_is_made(tmp_path, tiny_model, row, said):
    with pytest.raises(InputError) as caught:
        Silo(settings(tmp_path, tiny_model, [*ROWS, row]), TRUSTED).close()
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({"labels": ()}, "policy.labels is empty"),
        ({"labels": ("a",)}, "give two or more"),
        ({"labels": ("caf\u00e9", "cafe\u0301")}, "each once"),
        ({"template": "{note"}, "policy.template"),
        ({"template": "{note!r}"}, "conversion"),
        ({"template": "{0}"}, "a field named '0'"),
        ({"template": "{note.x}"}, "a field named 'note.x'"),
        ({"template": "words alone"}, "it names no field"),
        ({"label_sets": [["yes", "no"]]}, "policy.label_sets"),
        ({"tasks": ["causal"]}, "the task 'causal' has no use for labels"),
        ({"tasks": ["causal"], "labels": (), "pooling": "mean"}, "policy.pooling is 'mean'"),
    ],
)
def test_a_policy_that_is_no_task_is_refused(tmp_path, tiny_model, policy, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        settings(tmp_path, tiny_model, **policy)
