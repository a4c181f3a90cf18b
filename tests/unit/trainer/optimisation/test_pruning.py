"""Weights and neurons that a model loses: the smallest ones, and what is left is a model that transformers loads."""

import copy

import pytest
import torch
from small_models import FAMILIES, a_model, logits

from configs.errors import InputError
from trainer.models.load import read_model
from trainer.models.recurrent import RecurrentForCausalLM
from trainer.optimisation.measuring import sizes
from trainer.optimisation.pruning import prune_neurons, prune_weights


@pytest.mark.parametrize("family", FAMILIES)
def test_the_smallest_weights_become_zero_and_the_others_stay(family):
    before, after = a_model(family), a_model(family)
    prune_weights(after, 0.25)
    name, *_ = FAMILIES[family]
    old, new = (model.get_submodule(name).weight for model in (before, after))
    gone = new == 0
    assert gone.sum() == old.numel() // 4
    assert torch.equal(new[~gone], old[~gone])
    assert old[gone].abs().max() <= old[~gone].abs().min()
    assert torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)
    assert set(before.state_dict()) == set(after.state_dict())
    assert sizes(before)["zeros"] < 0.05 < sizes(after)["zeros"]
    assert sizes(before)["bytes"] == sizes(after)["bytes"]


@pytest.mark.parametrize("prune", [prune_weights, prune_neurons])
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_loads_what_is_left(family, prune, tmp_path):
    model = a_model(family)
    whole = logits(model)
    prune(model, 0.5)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    assert not torch.equal(expected, whole)
    assert torch.equal(logits(FAMILIES[family][2].from_pretrained(tmp_path).eval()), expected)
    assert torch.allclose(logits(read_model(tmp_path, "here")), expected, atol=1e-5)
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") + 8
    assert (tmp_path / "model.safetensors").stat().st_size - header == sizes(model)["bytes"]


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_that_say_nothing_are_those_that_go(family):
    model, (name, width, _) = a_model(family), FAMILIES[family]
    out = [
        module for own, module in model.named_modules() if own.endswith(name.split("1.")[1]) and "attention" not in own
    ]
    assert len(out) == 2
    with torch.no_grad():
        for layer in out:  # the same in both blocks: every other neuron leads nowhere
            side = 1 if isinstance(layer, torch.nn.Linear) else 0
            layer.weight.index_fill_(side, torch.arange(0, width, 2), 0.0)
    expected, smaller = logits(model), copy.deepcopy(model)
    prune_neurons(smaller, 0.5)
    assert torch.allclose(logits(smaller), expected, atol=1e-5)
    assert sizes(smaller)["bytes"] < sizes(model)["bytes"]
    assert smaller.get_submodule(name).weight.numel() == width // 2 * 16


def test_at_least_one_neuron_stays():
    model = a_model("llama")
    prune_neurons(model, 0.999)
    assert model.config.intermediate_size == 1
    assert logits(model).isfinite().all()


def test_a_family_without_known_neurons_is_refused():
    config = RecurrentForCausalLM.config_class(vocab_size=50, hidden_size=16)
    with pytest.raises(InputError, match="--method neurons: not known for a RecurrentForCausalLM"):
        prune_neurons(RecurrentForCausalLM(config), 0.5)
