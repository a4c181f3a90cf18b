"""Heads on every token: gradients of single records, together to the last bit, and padding that changes nothing."""

import numpy as np
import pytest
import torch
from per_record import alike_here, assert_equal, clipped, fixed, oracle
from tiny_bert import CONTEXT, base_model, published, word_pieces

from configs.schema.tasks import TaskSpec
from privacy.clipping.clipping import clipping
from privacy.clipping.independence import Together
from privacy.clipping.self_check import prove_per_record_gradients
from trainer.models.adapters import add_adapter, head_names, trainable
from trainer.models.load import load_model
from trainer.tasks.task import kind_of, task_of

TEXT = "Ada Lovelace lived in Ockham Park and near St James Square , where Charles Babbage came to see her"
SPECS = {
    "entities": TaskSpec(name="entities", labels=("O", "B-PER", "I-PER", "B-LOC")),
    "qa": TaskSpec(name="qa"),
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    return base_model(folder, published(folder / "theirs", [TEXT] * 3))


@pytest.fixture(params=SPECS, scope="module")
def headed(request, model_folder):
    """A task, and a model with its head and an adapter that says something."""
    task = task_of(SPECS[request.param], model_folder)
    model = add_adapter(load_model(model_folder, None, task.head), 4, 8.0, seed=2, head=task.head)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in trainable(model).items():
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return task, model.train()


def examples(task, number=30):
    """Examples of several lengths, from texts."""
    rng, words = np.random.default_rng(0), TEXT.split()
    found = []
    while len(found) < number:
        chosen = [words[place] for place in rng.integers(len(words), size=int(rng.integers(2, 24)))]
        if task.name == "entities":
            row = {"tokens": tuple(chosen), "tags": tuple(rng.integers(4, size=len(chosen)).tolist())}
        else:
            answer = chosen[int(rng.integers(len(chosen)))]
            row = {"context": " ".join(chosen), "question": "Who came?", "answer": ((answer,), (-1,))}
        found += task.examples([row])
    return found[:number]


def losses_of(task, model):
    return lambda units: task.record_losses(model, task.collate(units))


def test_the_head_trains_whole_and_nothing_else_but_the_adapter(headed):
    task, model = headed
    (head,) = head_names(model.get_base_model())
    whole = [name for name in trainable(model) if "lora" not in name]
    assert whole
    assert all(head in name for name in whole)
    assert {value.shape[0] for name, value in trainable(model).items() if name in whole} == {task.head.size}


def test_clipped_sums_are_those_of_a_loop_over_single_records(headed):
    task, model = headed
    units = examples(task)
    losses = losses_of(task, model)
    with clipping(model, 0.5) as clipper:
        prove_per_record_gradients(clipper, losses, task.synthetic())
    assert_equal(clipped(model, losses, [units[:14], units[14:]], 0.5), oracle(model, losses, units, fixed(0.5)))


def test_records_are_computed_together_and_to_the_last_bit_as_alone(headed):
    task, model = headed
    units, losses, sizes = examples(task), losses_of(task, model), []

    def total(batch):
        with clipping(model, 0.3) as clipper:
            for part in Together(clipper, losses, task.shape, task.made_up, 16).cut(batch):
                sizes.append(len(part))
                clipper.accumulate(losses, part)
            return torch.cat([value.flatten() for value in clipper.take().values()])

    alone = sum(total([unit]) for unit in units)
    assert alone.any()
    for seed in (0, 1):
        assert torch.equal(
            total([units[place] for place in np.random.default_rng(seed).permutation(len(units))]), alone
        )
    assert max(sizes) >= 8 or not alike_here(model, losses, task.made_up(task.shape(units[0]), 8))


def test_padding_changes_nothing(headed):
    task, model = headed
    short, long = sorted(examples(task), key=lambda one: len(one.ids))[:: len(examples(task)) - 1]
    assert task.shape(short) < task.shape(long)
    with torch.no_grad():
        alone = losses_of(task, model)([short])[0]
        beside = losses_of(task, model)([short, long])[0]
    assert beside.item() == pytest.approx(alone.item(), rel=1e-5)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("context_length", [8, 20, CONTEXT])
def test_made_up_examples_have_the_shape_that_is_asked_for(name, context_length):
    task = kind_of(name)(word_pieces([TEXT]), context_length, SPECS[name])
    for shape in {min(16, context_length), context_length}:
        made = task.made_up(shape, 16)
        assert {task.shape(one) for one in made} == {shape}
        assert len({(one.ids, one.target) for one in made}) == 16
    assert len(task.synthetic()) > 1
