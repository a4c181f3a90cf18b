"""F1 of the private evaluation: counts against a plain loop, how far one unit moves them, errors, and who allows it."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluations import alone, bounds_for
from silo_requests import TRUSTED, ask

from configs.errors import InputError, PolicyRefusal
from configs.load import load
from configs.schema.silo import SiloConfig, SiloPolicy
from federated.adapters.warm_model import warm_model
from federated.evaluation.label_counts import Example, examples_of, label_counts
from federated.evaluation.private_sums import checked_sums, figures, private_sums
from federated.protocol import silo_pb2 as pb
from federated.silo.policy import check_plan
from federated.silo.silo import Silo
from federated.simulation.simulated_places import simulated_silo
from privacy.mechanism.streams import Streams
from privacy.plan import METRIC, PlanTerms
from trainer.data.tokenizer import load_tokenizer
from trainer.models.adapters import Adaptation
from trainer.tasks.task import Encoded
from trainer.tasks.text import CausalTask

LABELS = ("yes", "no", "not sure")
CONTEXT, NOISE = 64, 3.0
PLAN = {
    "sampling_rate": 0.05,
    "max_grad_norm": 1.0,
    "noise_multiplier": 0.8,
    "rounds": 2,
    "steps_per_round": 2,
    "delta": 1e-5,
    "metric_releases": [{"name": METRIC, "noise_multiplier": NOISE, "releases": 2}],
}
TEXTS = [
    *(f"{question}{answer}" for question in ("Is the list empty? ", "x = 1, and y: ", "a") for answer in LABELS[1:]),
    "Return the number of items, yes",
    "Does it raise?\n\nyes \n",
    "no",
    "The eyes",  # "yes" is part of a longer word
    "a file, not sure whether",
    "",
    "Return the number of items. " * 40 + "yes",  # longer than the context
]


def plan(*labels, **changes):
    tree = {**PLAN, **changes}
    if labels:
        tree["metric_releases"] = [{**PLAN["metric_releases"][0], "labels": labels}]
    return PlanTerms(**tree)


def streams(number):
    return Streams(number.to_bytes(32, "big"), "ab" * 32)


@pytest.fixture(scope="module")
def task(tiny_model):
    return CausalTask(load_tokenizer(tiny_model), CONTEXT)


@pytest.fixture(scope="module")
def model(tiny_model):
    return warm_model(tiny_model, Adaptation(4, 8.0)).eval()


def plain_nats(model, tokenizer, text):
    ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    if len(ids) > CONTEXT:
        return None
    with torch.no_grad():
        scores = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=1)
    return -sum(scores[position, token].item() for position, token in enumerate(ids[1:]))


def plain_counts(model, tokenizer, texts):
    """Oracle: unit by unit, label by label, from the words of the documentation."""
    counts = np.zeros((3, len(LABELS)))
    for text in map(str.strip, texts):
        own = [i for i, label in enumerate(LABELS) if f" {text}".replace("\n", " ").endswith(f" {label}")]
        if not own:
            continue
        (truth,) = own
        nats = [plain_nats(model, tokenizer, text[: len(text) - len(LABELS[truth])] + label) for label in LABELS]
        if None not in nats:
            answer = nats.index(min(nats))
            for kind, index in [(0, truth)] if answer == truth else [(1, answer), (2, truth)]:
                counts[kind, index] += 1
    return counts


def test_the_counts_are_those_of_a_loop_over_units(model, task, tiny_model):
    expected = plain_counts(model, load_tokenizer(tiny_model), TEXTS)
    examples = examples_of(task, TEXTS, LABELS)
    assert len(examples) == expected[0].sum() + expected[1].sum()
    assert (expected.sum(axis=1) > 0).all()  # the tiny model is right once and wrong once, at least
    units = [task.encode(text) for text in TEXTS]
    np.testing.assert_array_equal(label_counts(model, task, examples, 3), expected)
    found = private_sums(model, task, alone(units), examples, bounds_for(CONTEXT, LABELS), 1e-9, streams(1))
    np.testing.assert_allclose(found[4:], expected.ravel(), atol=1e-6)
    without = private_sums(model, task, alone(units), [], bounds_for(CONTEXT), 1e-9, streams(1))
    np.testing.assert_allclose(found[:4], without, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("x: not sure", "not sure"),  # the longest
        ("(no", "no"),
        ("no", "no"),
        ("yes no\n", "no"),
        ("eyes", None),
        ("no.", None),
        ("No", None),
    ],
)
def test_which_label_a_text_ends_in(task, text, label):
    labels = (*LABELS, "sure")
    assert [labels[example.truth] for example in examples_of(task, [text], labels)] == ([label] if label else [])


@pytest.mark.parametrize("labels", [("caf\u00e9", "tea"), ("cafe\u0301", "tea")])
def test_a_label_is_found_in_every_unicode_form(task, labels):
    examples = examples_of(task, ["Where? caf\u00e9", "Where? cafe\u0301", "Where? cafe"], labels)
    assert [example.truth for example in examples] == [0, 0]


def test_adding_a_unit_moves_the_vector_by_no_more_than_its_sensitivity(model, task):
    """Each unit, taken out of all the others: those count for exactly what they counted for before."""
    bounds = bounds_for(CONTEXT, LABELS)

    def exact(texts):
        units, examples = [task.encode(text) for text in texts], examples_of(task, texts, LABELS)
        return np.array(private_sums(model, task, alone(units), examples, bounds, 1e-9, streams(1)))

    whole, norms = exact(TEXTS), set()
    for index in range(len(TEXTS)):
        moved = whole - exact(TEXTS[:index] + TEXTS[index + 1 :])
        assert np.linalg.norm(moved) <= bounds.sensitivity
        norms.add(round(float(np.linalg.norm(moved[4:])) ** 2))
    assert norms == {0, 1, 2}  # no example, a right one, a wrong one


class Scripted(CausalTask):
    """Likelihoods as told, the worst of the other values."""

    nats: tuple[float, ...] = ()
    asked = 0

    def record_nats(self, model, batch):
        """One ending after the other, for unit after unit."""
        assert len(batch["input_ids"]) == 1
        self.asked += 1
        return torch.tensor([self.nats[(self.asked - 1) % len(self.nats)]])

    def record_scores(self, model, records):
        return torch.tensor([[math.inf, 8 * CONTEXT, CONTEXT, CONTEXT]] * len(records), dtype=torch.float64)


def test_whatever_the_model_answers_the_sensitivity_holds_and_is_not_larger_than_it_need_be(tiny_model):
    task, found = Scripted(load_tokenizer(tiny_model), CONTEXT), set()
    unit = Encoded((0, 5, 0), 8 * CONTEXT, truncated=False)
    values = (0.0, 3.5, math.inf, math.nan, -math.inf)
    for task.nats in itertools.product(values, repeat=3):
        for truth in range(3):
            sums = private_sums(
                None, task, [(unit,)], [Example((unit,) * 3, truth)], bounds_for(CONTEXT, LABELS), 1e-9, streams(1)
            )
            found.add(round(float(np.linalg.norm(sums)), 5))
    assert max(found) == pytest.approx(bounds_for(CONTEXT, LABELS).sensitivity, abs=1e-4)
    assert found == {round(math.sqrt(5), 5), round(math.sqrt(6), 5)}
    task.nats = (2.0, 2.0, 3.0)
    assert label_counts(None, task, [Example((unit,) * 3, 0)], 3)[0, 0] == 1  # of equals the first
    assert bounds_for(CONTEXT).sensitivity == 2.0


@pytest.mark.parametrize(("labels", "sensitivity"), [((), 2.0), (LABELS, math.sqrt(6))])
def test_the_noise_is_the_plans_multiple_of_the_sensitivity(labels, sensitivity):
    bounds = bounds_for(CONTEXT, labels)
    drawn = np.array([private_sums(None, None, [], [], bounds, NOISE, streams(n)) for n in range(3000)])
    assert drawn.shape[1] == bounds.num_sums == 4 + 3 * len(labels)
    np.testing.assert_allclose(drawn.std(axis=0), NOISE * sensitivity, rtol=0.06)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(bounds.num_sums)).max() < 0.09


def test_labels_change_the_plan_and_its_digest_but_no_epsilon():
    """The multiplier is of the sensitivity, whatever that is; the silo takes it from the plan that it has reserved."""
    with_labels, without = plan(*LABELS), plan()
    assert with_labels.epsilon == without.epsilon
    assert with_labels.event() == without.event()
    assert with_labels.digest not in (without.digest, plan(*reversed(LABELS)).digest)
    assert "labels" not in without.model_dump()["metric_releases"][0]  # as before there were any
    assert PlanTerms(**json.loads(with_labels.model_dump_json())) == with_labels


def f1_figures(counts, error, labels):
    values = np.concatenate([np.zeros(4), counts.ravel()])
    return bounds_for(CONTEXT, labels).measures.figures(values, error)


@pytest.mark.parametrize(
    "labels", [("yes",), ("yes", "yes"), ("yes", ""), ("yes", " no"), ("yes", "no "), ("a\nb", "c")]
)
def test_labels_that_are_none(labels):
    with pytest.raises(ValueError, match="label"):
        plan(*labels)
    with pytest.raises(ValueError, match="label"):
        SiloPolicy(budget_epsilon=1.0, budget_delta=1e-5, label_sets=[labels])


def test_labels_that_nothing_would_evaluate_are_refused():
    with pytest.raises(
        InputError, match=r"privacy\.evaluation_labels is \['yes', 'no'\] and privacy\.evaluations is 0"
    ):
        load("tiny", ['privacy.evaluation_labels=["yes", "no"]'])
    config = load("tiny", ['privacy.evaluation_labels=["yes", "no"]', "privacy.evaluations=1"])
    assert simulated_silo(config, "north", Path("/model")).policy.label_sets == (("yes", "no"),)


def test_f1_is_the_textbooks():
    counts = np.array([[8.0, 3.0], [2.0, 1.0], [4.0, 5.0]])
    found = f1_figures(counts, 1e-9, ("a", "b"))
    for index, label in enumerate("ab"):
        precision = counts[0, index] / (counts[0, index] + counts[1, index])
        recall = counts[0, index] / (counts[0, index] + counts[2, index])
        assert found["f1_by_label"][label]["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert found["macro_f1"] == pytest.approx((found["f1_by_label"]["a"]["f1"] + found["f1_by_label"]["b"]["f1"]) / 2)


def test_its_errors_are_those_of_repeated_noise():
    counts, generator = np.array([[300.0, 90.0], [40.0, 60.0], [50.0, 45.0]]), np.random.default_rng(1)
    bounds, silos = bounds_for(CONTEXT, ("a", "b")), 2
    sums = np.array([400.0, 200.0, 100.0, 150.0, *counts.ravel()]) / silos
    std = NOISE * bounds.sensitivity
    drawn = [figures(sums + std * generator.standard_normal((silos, 10)), bounds, NOISE) for _ in range(1500)]
    for value, error in (
        *(([d["f1_by_label"][x]["f1"] for d in drawn], [d["f1_by_label"][x]["f1_error"] for d in drawn]) for x in "ab"),
        ([d["macro_f1"] for d in drawn], [d["macro_f1_error"] for d in drawn]),
    ):
        assert np.std(value) == pytest.approx(np.median(error), rel=0.08)


def test_noise_alone_gives_no_f1():
    found = f1_figures(np.array([[40.0, 0.5], [1.0, -2.0], [1.0, 0.1]]), 1.0, ("a", "b"))
    assert found["f1_by_label"]["a"]["f1"] is not None
    assert found["f1_by_label"]["b"] == {"f1": None, "f1_error": None}
    assert (found["macro_f1"], found["macro_f1_error"]) == (None, None)


def test_a_vector_of_another_length_is_rejected():
    bounds = bounds_for(CONTEXT, ("a", "b"))
    assert checked_sums([1.0] * 10, bounds) == [1.0] * 10
    for length in (4, 9, 11):
        with pytest.raises(ValueError, match=r"should be 10: nats.*of each label"):
            checked_sums([1.0] * length, bounds)


# In a silo


@pytest.fixture
def open_silo(tmp_path, tiny_model):
    opened = []

    def make(name, **policy):
        data = tmp_path / "data.jsonl"
        rows = [{"text": f"note {row} of the ward: {LABELS[row % 2]}"} for row in range(120)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        silo = {
            "id": "north",
            "dataset_id": "ward",
            "state_dir": str(tmp_path / name),
            "base_model": str(tiny_model),
            "public_record_count": 100,
        }
        given = {"budget_epsilon": 30.0, "budget_delta": 1e-4, "max_epsilon_per_run": 20.0, "releases_metrics": True}
        config = SiloConfig(silo=silo, data={"source": str(data)}, policy={**given, **policy})
        opened.append(Silo(config, TRUSTED, bytes(range(32))))
        return opened[-1]

    yield make
    for silo in opened:
        silo.close()


def reserve(silo, request):
    return ask(silo, "reserve", reserve=pb.Reserve(plan=request.model_dump_json()))[0]


def test_a_policy_lists_labels_in_every_unicode_form():
    policy = SiloPolicy(
        budget_epsilon=1e3, budget_delta=1e-3, releases_metrics=True, label_sets=[["cafe\u0301", "tea"]]
    )
    check_plan(plan("tea", "caf\u00e9"), policy, 100)
    check_plan(plan("cafe\u0301", "tea"), policy, 100)
    with pytest.raises(PolicyRefusal) as refused:
        check_plan(plan("caf\u00e9", "cafe\u0301", "tea"), policy, 100)
    assert refused.value.rule == "label_sets"


def test_a_silo_counts_only_the_labels_that_its_policy_lists(open_silo):
    listing = open_silo("listing", label_sets=[["ward", "home"], ["no", "yes"]])
    request = plan("yes", "no")
    assert reserve(listing, request).WhichOneof("kind") == "reserved"
    evaluate = pb.Evaluate(
        number=1,
        metric=METRIC,
        plan_digest=request.digest,
        base_model_digest=listing.workbench.base_model.content_digest,
        task="causal",
        adapter_spec=pb.AdapterSpec(rank=4, alpha=8.0),
    )
    reply = ask(listing, "evaluation-1", evaluate=evaluate)[0]
    checked_sums(reply.evaluated.sums, bounds_for(CONTEXT, ("yes", "no")))
    evaluate.plan_digest = plan().digest  # the vector without labels was not reserved
    assert ask(listing, "evaluation-2", evaluate=evaluate)[0].refusal.rule == "reservation"

    for silo, allowed in (
        (open_silo("none"), "none"),
        (
            open_silo("others", label_sets=[["ward", "home"], ["yes", "no", "not sure"]]),
            "ward, home; yes, no, not sure",
        ),
    ):
        refusal = reserve(silo, request).refusal
        assert (refusal.rule, refusal.asked, refusal.allowed) == ("label_sets", "yes, no", allowed)
        assert [json.loads(entry["body"])["kind"] for entry in silo.ledger.entries()] == ["open"]
