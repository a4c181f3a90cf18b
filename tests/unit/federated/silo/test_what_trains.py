"""What of the model a request may train: the policy allows it, the model has it, and that alone leaves."""

import numpy as np
import pytest
from silo_requests import COORDINATOR, TRUSTED, ask, ward

from configs.errors import InputError
from federated.adapters.arrays import from_bytes, to_bytes
from federated.adapters.lora_factors import frozen, frozen_digest
from federated.adapters.warm_model import held_back_in, initial_adapter
from federated.protocol import silo_pb2 as pb
from federated.protocol.envelope import seal_request
from federated.silo.silo import Silo
from privacy.plan import METRIC, MetricRelease, PlanTerms
from trainer.models.load import load_model

PLAN = PlanTerms(
    sampling_rate=0.05,
    max_grad_norm=1.0,
    noise_multiplier=1.0,
    rounds=9,
    steps_per_round=1,
    delta=1e-5,
    metric_releases=(MetricRelease(name=METRIC, noise_multiplier=8.0, releases=2),),
)
ALL = ("lora", "full", "head", "bitfit")


def opened(folder, tiny_model, **policy):
    folder.mkdir(exist_ok=True)
    silo = Silo(ward(folder, tiny_model, releases_metrics=True, **policy), TRUSTED, bytes(range(32)))
    assert ask(silo, "reserve", reserve=pb.Reserve(plan=PLAN.model_dump_json()))[0].WhichOneof("kind") == "reserved"
    return silo


@pytest.fixture(scope="module")
def silo(tmp_path_factory, tiny_model):
    silo = opened(tmp_path_factory.mktemp("silo"), tiny_model, train=ALL)
    yield silo
    silo.close()


def initial(tiny_run, *overrides):
    return initial_adapter(tiny_run.config(*overrides), tiny_run.model)


def request(silo, adapter, **spec):
    return {
        "plan_digest": PLAN.digest,
        "base_model_digest": silo.workbench.base_model.content_digest,
        "task": "causal",
        "adapter_spec": pb.AdapterSpec(rank=4, alpha=8.0, **spec),
        "adapter": to_bytes(adapter) if adapter else b"",
    }


def train(silo, request_id, adapter, round_number=1, **spec):
    fields = {"round": round_number, "learning_rate": 0.01, "optimizer": "sgd"}
    return ask(silo, request_id, train=pb.Train(**request(silo, adapter, **spec), **fields))[0]


@pytest.mark.parametrize(
    ("number", "settings", "spec"),
    [
        (1, ["federated.train=full"], {"train": "full"}),
        (2, ["federated.train=head"], {"train": "head"}),
        (3, ['federated.adapter_targets=["q_proj", "lm_head"]'], {"targets": ["q_proj", "lm_head"]}),
        (4, ["federated.base_dtype=bfloat16"], {"base_dtype": "bfloat16"}),
    ],
)
def test_what_the_request_names_trains_and_nothing_else_leaves(silo, tiny_run, number, settings, spec):
    sent = initial(tiny_run, *settings)
    update = from_bytes(train(silo, f"round {number}", sent, number, **spec).trained.update)
    assert {name: array.shape for name, array in update.items()} == {name: array.shape for name, array in sent.items()}
    assert all(array.any() for array in update.values())
    if spec.get("train") == "head":
        assert set(update) == {"lm_head.weight"}


def test_a_frozen_a_is_the_same_beside_weights_in_bfloat16(silo, tiny_run):
    adapter, seed = initial(tiny_run), tiny_run.config().run.seed
    sent = {name: array for name, array in adapter.items() if not frozen(name)}
    spec = {"base_dtype": "bfloat16", "frozen_digest": frozen_digest(adapter), "frozen_seed": seed}
    assert set(from_bytes(train(silo, "ffa", sent, 5, **spec).trained.update)) == set(sent)


def below(adapter, part):
    return {name: array for name, array in adapter.items() if part in name}


@pytest.fixture(scope="module")
def staged(tmp_path_factory, tiny_model):
    silo = opened(tmp_path_factory.mktemp("staged"), tiny_model, train=ALL)
    yield silo
    silo.close()


def in_stage(silo, request_id, adapter, round_number, part, **changes):
    held = below(adapter, part)
    sent = {name: array for name, array in adapter.items() if name not in held}
    fields = {"round": round_number, "learning_rate": 0.01, "optimizer": "sgd", "frozen": to_bytes(held)}
    return ask(silo, request_id, train=pb.Train(**{**request(silo, sent), **fields, **changes}))


def test_what_a_round_freezes_takes_part_and_does_not_leave(staged, tiny_run):
    adapter = initial(tiny_run)
    reply, _ = in_stage(staged, "stage-1", adapter, 1, "layers.0.", frozen_below=2)
    update = from_bytes(reply.trained.update)
    assert set(update) == set(adapter) - set(below(adapter, "layers.0."))
    assert all(array.any() for array in update.values())
    # 1. It is what the request says that it is: another value of it makes another update, seed and all else equal.
    other = {name: array + 0.5 if "layers.0." in name else array for name, array in adapter.items()}
    moved, _ = in_stage(staged, "stage-2", other, 2, "layers.0.", frozen_below=2)
    plain, _ = in_stage(staged, "stage-3", adapter, 3, "layers.0.", frozen_below=2)
    assert moved.trained.update != plain.trained.update
    # 2. The next round may train all of it again, and an answered request has the same answer.
    whole, body = ask(
        staged,
        "stage-4",
        train=pb.Train(**request(staged, adapter), round=4, learning_rate=0.01, optimizer="sgd"),
    )
    assert set(from_bytes(whole.trained.update)) == set(adapter)
    in_stage(staged, "stage-5", adapter, 5, "layers.0.", frozen_below=2)
    assert staged.handle(seal_request(COORDINATOR, body)) == staged.handle(seal_request(COORDINATOR, body))


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("layers.0.", {}),  # something is sent that is not said to be frozen
        ("layers.0.", {"frozen_below": 1}),
        ("layers.1.", {"frozen_below": 2}),
        ("", {"frozen_below": 99}),  # nothing is left to train
        ("layers.0.", {"frozen_below": 2, "frozen": b""}),
    ],
)
def test_what_is_frozen_has_to_be_what_the_request_says(staged, tiny_run, part, changes):
    charged = staged.ledger.journal.bodies()
    reply, _ = in_stage(staged, "other", initial(tiny_run), 9, part, **changes)
    assert reply.refusal.rule == "adapter"
    assert staged.ledger.journal.bodies() == charged


def test_a_frozen_layer_beside_a_frozen_a(tmp_path, tiny_run, tiny_model):
    silo = opened(tmp_path / "ffa", tiny_model)
    adapter, seed = initial(tiny_run), tiny_run.config().run.seed
    sent = {name: array for name, array in adapter.items() if not frozen(name)}
    spec = pb.AdapterSpec(rank=4, alpha=8.0, frozen_digest=frozen_digest(adapter), frozen_seed=seed)
    reply, _ = in_stage(silo, "ffa", sent, 1, "layers.0.", frozen_below=2, adapter_spec=spec)
    assert set(from_bytes(reply.trained.update)) == set(sent) - set(below(sent, "layers.0."))
    silo.close()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["federated.stages=[{rounds=2, frozen='embeddings'}]"], "stages.0.frozen is 'embeddings': nothing of what"),
        (
            ["federated.stages=[{rounds=1}, {rounds=1, frozen=2}]", 'federated.adapter_targets=["q_proj"]'],
            "stages.1.frozen is 2: all of what trains lies there",
        ),
    ],
)
def test_a_stage_that_freezes_nothing_or_all_is_refused_before_anybody_is_asked(tiny_run, settings, expected):
    with pytest.raises(InputError) as caught:
        held_back_in(tiny_run.config(*settings), tiny_run.model)
    assert expected in str(caught.value)


def test_each_round_holds_back_what_its_stage_freezes(tiny_run):
    stages = "federated.stages=[{rounds=1, frozen='embeddings'}, {rounds=1}]"
    held_back = held_back_in(tiny_run.config(stages, "federated.train=full"), tiny_run.model)
    assert (held_back(1), held_back(2)) == ({"model.embed_tokens.weight"}, frozenset())


def test_a_round_of_shorter_examples_and_one_of_all(staged, tiny_run):
    adapter = initial(tiny_run)
    found = {}
    for number, length in ((6, 8), (7, 64), (8, 0)):
        fields = {"round": number, "learning_rate": 0.01, "optimizer": "sgd", "context_length": length}
        asked = pb.Train(**request(staged, adapter), **fields)
        assert ask(staged, f"length-{number}", train=asked)[0].WhichOneof("kind") == "trained"
        examples = staged.workbench.examples(asked)
        found[length] = max(len(example.ids) for unit in examples.records for example in unit)
    assert found[8] == 8 < found[64] == found[0] <= 64
    for length in (7, 65):
        fields = {"round": 9, "learning_rate": 0.01, "optimizer": "sgd", "context_length": length}
        reply = ask(staged, "beyond", train=pb.Train(**request(staged, adapter), **fields))[0]
        assert (reply.refusal.rule, reply.refusal.allowed) == ("context_length", "8 to 64")


def test_parameters_that_travel_begin_as_the_base_models(tiny_run):
    base = dict(load_model(tiny_run.model).named_parameters())
    found = initial(tiny_run, "federated.train=full")
    assert set(found) == set(base)
    assert all(np.array_equal(array, base[name].detach().numpy()) for name, array in found.items())


def test_a_steward_who_says_nothing_allows_adapters_alone(tmp_path, tiny_model, tiny_run):
    silo = opened(tmp_path / "silo", tiny_model)
    refusal = train(silo, "full", initial(tiny_run, "federated.train=full"), train="full").refusal
    assert (refusal.rule, refusal.asked, refusal.allowed) == ("train", "full", "lora")
    assert "charge" not in str(silo.ledger.entries()[-1]["body"])
    silo.close()


@pytest.mark.parametrize(
    ("spec", "rule", "message"),
    [
        ({"train": "everything"}, "train", "asked everything, allowed lora, full, head, bitfit"),
        ({"train": "bitfit"}, "adapter_spec", "this model has no biases"),
        ({"base_dtype": "int4"}, "base_dtype", "asked int4, allowed float32 or bfloat16 where train is lora"),
        ({"base_dtype": "bfloat16", "train": "full"}, "base_dtype", "allowed float32 where train is full"),
        ({"targets": ["query"]}, "adapter_spec", "'query': no linear layer of this model; it has down_proj"),
        ({"targets": ["q_proj"]}, "adapter", "other names or shapes"),
        ({"train": "full"}, "adapter", "other names or shapes"),
    ],
)
def test_what_the_silo_or_its_model_has_not_got_is_refused_before_a_charge(silo, tiny_run, spec, rule, message):
    before = len(silo.ledger.entries())
    refusal = train(silo, f"refused {spec}", initial(tiny_run), 9, **spec).refusal
    assert (refusal.rule, message in refusal.message) == (rule, True)
    assert len(silo.ledger.entries()) == before


def test_without_lora_the_base_model_is_evaluated_by_its_own_parameters(silo, tiny_run):
    start = initial(tiny_run, "federated.train=full")

    def evaluate(request_id, adapter):
        fields = request(silo, adapter, train="full")
        return ask(silo, request_id, evaluate=pb.Evaluate(number=1, metric=METRIC, **fields))[0]

    refusal = evaluate("nothing", None).refusal
    assert (refusal.rule, refusal.asked) == ("adapter", "none")
    assert len(evaluate("base", start).evaluated.sums) == 4
