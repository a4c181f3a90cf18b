"""Steps that read changed words: against a loop over single units with the same draws, and what a silo refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
from chat_templates import tokenizer_of
from per_record import fixed, oracle
from silo_requests import TRUSTED, ask
from tiny_bert import base_model, published
from transformers import AutoModelForCausalLM, LlamaConfig

from configs.errors import InputError
from configs.load import load
from configs.schema.silo import SiloConfig
from configs.schema.tasks import AugmentationSettings, TaskSpec
from configs.storage.manifests import read_manifest
from federated.adapters.arrays import to_bytes
from federated.adapters.warm_model import initial_adapter
from federated.protocol import silo_pb2 as pb
from federated.silo.local_training import LocalSettings, PrivateUpdate, public_update
from federated.silo.silo import Silo
from privacy.mechanism.noise import noised
from privacy.mechanism.sampler import one_example_each, poisson_sample
from privacy.mechanism.streams import Streams
from privacy.plan import PlanTerms
from trainer.augmentation import augmentation
from trainer.models.adapters import adapter_weights, add_adapter, trainable
from trainer.models.load import load_model
from trainer.tasks.classification import ClassificationTask
from trainer.tasks.task import task_of
from trainer.tasks.text_to_text import TranslationTask

LABELS = ("calm", "urgent")
SPEC = TaskSpec(name="classification", labels=LABELS)
SHARES = {"dropout": 0.3, "swap": 0.3}
PLAN = PlanTerms(sampling_rate=0.3, max_grad_norm=0.3, noise_multiplier=0.7, rounds=2, steps_per_round=3, delta=1e-5)
BOUND = PLAN.bind(20)
SAID = "the ward was calm and nobody came to see who had asked for it at night"


def streams(number=0):
    return Streams(bytes([number]) * 32, "ab" * 32)


def texts(number):
    return " ".join(np.random.default_rng(number).permutation(SAID.split())[: 3 + number % 12])


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    return base_model(folder, published(folder / "theirs", [SAID] * 3))


@pytest.fixture(scope="module")
def gpt(tmp_path_factory):
    return tokenizer_of(tmp_path_factory.mktemp("gpt"))


def classification(bert):
    task = task_of(SPEC, bert)
    model = add_adapter(load_model(bert, head=task.head), 3, 6.0, seed=2, head=task.head)
    return task, model, [task.examples([{"text": texts(n), "label": n % 2}]) for n in range(20)]


def translation(gpt):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(gpt), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    task = TranslationTask(gpt, 96, TaskSpec(name="translation"))
    model = add_adapter(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), 3, 6.0, seed=2)
    return task, model, [task.examples([{"source": texts(n), "target": texts(n + 99)}]) for n in range(20)]


@pytest.fixture(params=["classification", "translation"])
def case(request, bert, gpt):
    """A task, its model with weights such as an adapter has after some training, and 20 units."""
    task, model, units = classification(bert) if request.param == "classification" else translation(gpt)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in trainable(model).values():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return task, model.train(), units


def adapter_of(model):
    return {name: value.detach().numpy().copy() for name, value in adapter_weights(model).items()}


def update(case, number=0, shares=SHARES, kind=PrivateUpdate, units=None, micro_batch_size=16):
    task, model, own = case
    before = adapter_of(model)
    augment = augmentation(task, AugmentationSettings(**shares))
    settings = LocalSettings(0.5, "sgd", micro_batch_size, "bookkeeping", augment=augment)
    units = own if units is None else units
    try:
        if kind is PrivateUpdate:
            return PrivateUpdate(BOUND, model, task, before, settings).run(streams(number), units)
        return public_update(BOUND, streams(number), model, task, before, units, settings)
    finally:
        put_back(model, before)


def put_back(model, weights):
    with torch.no_grad():
        for name, value in trainable(model).items():
            value.copy_(torch.from_numpy(weights[name]))


def changed_by_hand(example, draws, beside):
    """The rule once more, written another way: swaps from left to right, then masks (none here), then what is left."""
    swaps, _, drops = draws
    words = [place for place, word in enumerate(example.words) if word]
    tokens = list(enumerate(example.ids))
    number = 0
    while number + 1 < len(words):
        here, there = words[number], words[number + 1]
        swap = swaps[number] < SHARES["swap"] and there - here == 1
        if swap:
            tokens[here], tokens[there] = (here, tokens[there][1]), (there, tokens[here][1])
        number += 2 if swap else 1
    gone = {place for place, draw in zip(words, drops, strict=True) if draw < SHARES["dropout"]}
    left = tokens if len(gone) == len(words) else [token for token in tokens if token[0] not in gone]
    target = tuple(example.target[place] for place, _ in left) if beside else example.target
    return tuple(token for _, token in left), target


@pytest.mark.parametrize("private", [True, False])
def test_the_update_is_a_loop_over_single_units_with_the_same_draws(case, private):
    task, model, units = case
    found = update(case, kind=PrivateUpdate if private else public_update)
    before = adapter_of(model)
    beside = not isinstance(task, ClassificationTask)
    seen = 0

    def losses(batch):
        return task.record_losses(model, task.collate(batch))

    for step in range(3):
        batch = []
        for place in poisson_sample(BOUND, streams(), step, 20):
            (example,) = units[place]
            draws = streams().generator("augment", step, str(place)).random((3, sum(example.words)))
            ids, target = changed_by_hand(example, draws, beside)
            seen += ids != example.ids
            batch.append(type(example)(ids, 0, truncated=False, target=target))
        sums = oracle(model, losses, batch, fixed(0.3) if private else lambda _: 1.0)
        with torch.no_grad():
            for name, value in trainable(model).items():
                release = noised(sums[name], BOUND.noise_std, streams(), step, name) if private else sums[name]
                value.sub_(0.5 * (release / 6).to(value.dtype))
    expected = {name: value - before[name] for name, value in adapter_of(model).items()}
    assert seen > 8
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-5)
    assert any(np.abs(found[name] - plain).max() > 1e-4 for name, plain in update(case, shares={}).items())


def test_the_same_charge_gives_the_same_bits_and_micro_batches_change_none(case):
    """Lengths change with each draw, and so does what may be computed together."""
    first, again, single, other = update(case), update(case), update(case, micro_batch_size=1), update(case, 1)
    for name, array in first.items():
        assert array.tobytes() == again[name].tobytes() == single[name].tobytes()
        assert array.tobytes() != other[name].tobytes()


def test_a_share_of_zero_is_the_step_of_before_to_the_bit(case):
    """An augmentation that changes nothing reads the same words in the same order."""
    plain = update(case, shares={})
    task, model, units = case
    settings = LocalSettings(0.5, "sgd", 16, "bookkeeping", augment=lambda example, _: example)
    before = adapter_of(model)
    same = PrivateUpdate(BOUND, model, task, before, settings).run(streams(), units)
    put_back(model, before)
    assert all(same[name].tobytes() == array.tobytes() for name, array in plain.items())


def test_other_units_change_nothing_of_what_is_read_of_one(case):
    """What a unit is read as does not depend on whoever is beside it, and so its clipped gradient doesn't either."""
    task, _, units = case
    augment = augmentation(task, AugmentationSettings(**SHARES))
    batch = one_example_each(streams(), 0, units, range(20), augment)
    others = [*units[5:], *units[:5]]
    others[7] = units[7]
    beside = one_example_each(streams(), 0, others, range(20), augment)
    (alone,) = one_example_each(streams(), 0, units, [7], augment)
    assert batch[7] == beside[7] == alone
    assert [one.ids for one in batch] != [one.ids for one in beside]


def test_no_stream_is_drawn_from_twice(case):
    """Neither noise nor samples share a stream with what changes words."""
    task, model, units = case
    asked = []

    class Watched(Streams):
        def generator(self, purpose, step, name=""):
            asked.append((purpose, step, name))
            return super().generator(purpose, step, name)

    before = adapter_of(model)
    augment = augmentation(task, AugmentationSettings(**SHARES))
    settings = LocalSettings(0.5, "sgd", 16, "bookkeeping", augment=augment)
    PrivateUpdate(BOUND, model, task, before, settings).run(Watched(bytes(32), "ab" * 32), units)
    put_back(model, before)
    assert len(set(asked)) == len(asked)
    drawn = {(step, name) for purpose, step, name in asked if purpose == "augment"}
    sampled = [poisson_sample(BOUND, streams(), step, 20) for step in range(3)]
    assert drawn == {(step, str(place)) for step, places in enumerate(sampled) for place in places}


# A silo's word on it


@pytest.fixture(scope="module")
def silo(bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("silo")
    rows = [{"text": texts(n), "label": LABELS[n % 2]} for n in range(60)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = Silo(settings(folder, bert, max_augmentation=0.3), TRUSTED, bytes(range(32)))
    ask(opened, "reserve", reserve=pb.Reserve(plan=PLAN.model_dump_json()))
    yield opened
    opened.close()


def settings(folder, bert, **policy):
    return SiloConfig(
        silo={
            "id": "north", "dataset_id": "ward", "state_dir": str(folder / "state"), "base_model": str(bert),
            "public_record_count": 50,
        },
        data={"source": str(folder / "data.jsonl")},
        policy={
            "tasks": ["classification"], "labels": LABELS, "max_sampling_rate": 0.5,
            "base_models": [read_manifest(bert, "model").content_digest],
            "budget_epsilon": 200.0, "budget_delta": 1e-4, "max_epsilon_per_run": 200.0, **policy,
        },
    )  # fmt: skip


def train(silo, request_id, round_number=1, **augment):
    asked = {
        "round": round_number,
        "plan_digest": PLAN.digest,
        "base_model_digest": silo.workbench.base_model.content_digest,
        "task": "classification",
        "task_spec": pb.TaskSpec(labels=LABELS),
        "adapter_spec": pb.AdapterSpec(rank=2, alpha=4.0),
        "learning_rate": 0.01,
        "optimizer": "sgd",
    }
    shapes = {name: value.shape for name, value in trainable(silo.workbench.model(pb.Train(**asked))).items()}
    adapter = to_bytes({name: np.full(shape, 0.05, np.float32) for name, shape in shapes.items()})
    changed = {"augmentation": pb.Augmentation(**augment)} if augment else {}
    return ask(silo, request_id, train=pb.Train(**asked, adapter=adapter, **changed))[0]


def charges(silo):
    return [json.loads(entry["body"])["kind"] for entry in silo.ledger.entries()].count("charge")


@pytest.mark.parametrize("share", [-0.1, 0.31, 1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["dropout", "swap", "mask"])
def test_a_share_beyond_the_policys_is_refused_before_any_charge(silo, kind, share):
    before = charges(silo)
    refusal = train(silo, "refused", **{kind: share}).refusal
    assert (refusal.rule, refusal.asked) == ("max_augmentation", f"{share:g} for {kind}")
    assert refusal.allowed == "0 to 0.3"
    assert charges(silo) == before


def test_a_policy_that_names_none_allows_none(silo):
    before, own = charges(silo), silo.config
    silo.config = own.model_copy(update={"policy": own.policy.model_copy(update={"max_augmentation": 0.0})})
    refusal = train(silo, "refused", dropout=0.1).refusal
    silo.config = own
    assert refusal.message == "max_augmentation: asked 0.1 for dropout, allowed 0"
    assert charges(silo) == before


def test_a_release_that_is_made_again_reads_the_same_words(silo, monkeypatch):
    """The charge's seed is all that is random: a silo that was killed before the release makes the same bytes again."""
    made = []

    def lost(_number, _run, reply):
        made.append(reply)
        raise OSError("killed")

    shares = {"dropout": 0.2, "swap": 0.1, "mask": 0.1}
    plain = train(silo, "plain").trained.update
    with monkeypatch.context() as patched:
        patched.setattr(silo.ledger, "release", lost)
        assert train(silo, "changed", 2, **shares).WhichOneof("kind") == "failure"
    before = charges(silo)
    reply = train(silo, "changed", 2, **shares)
    assert reply.trained.update == pb.Reply.FromString(made[0]).trained.update != plain
    assert train(silo, "changed", 2, **shares) == reply
    assert charges(silo) == before


def test_a_model_without_a_mask_token_is_no_reason_to_charge(silo, monkeypatch):
    before = charges(silo)
    monkeypatch.setitem(silo.workbench.task._tokenizer._special_tokens_map, "mask_token", None)
    refusal = train(silo, "refused", 2, mask=0.1).refusal
    assert (refusal.rule, refusal.asked) == ("augmentation", "mask 0.1")
    assert charges(silo) == before


@pytest.mark.parametrize("task", ["causal", "entities", "qa"])
def test_a_policy_of_a_task_without_it_refuses_it_by_name(tmp_path, bert, task):
    labels = {"labels": ("O", "B-X") if task == "entities" else ()}
    with pytest.raises(ValueError, match=rf"policy\.max_augmentation is 0\.2: the task '{task}' learns"):
        settings(tmp_path, bert, max_augmentation=0.2, tasks=[task], **labels)


def test_the_coordinator_hears_of_a_missing_mask_token_before_it_asks_anybody(tmp_path, bert):
    shutil.copytree(bert, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    words = json.loads(file.read_text())
    given = ['federated.task="classification"', f"federated.labels={json.dumps(LABELS)}"]
    config = load("tiny", [*given, "federated.augmentation.mask=0.1"])
    assert initial_adapter(config, bert)
    file.write_text(json.dumps({name: word for name, word in words.items() if name != "mask_token"}))
    with pytest.raises(InputError, match="no mask token"):
        initial_adapter(config, tmp_path / "model")
