"""Weights as integers: what is written loads again, by plain transformers too, and answers the same; and its size."""

import copy
import importlib.util

import pytest
import torch
from small_models import FAMILIES, a_model, logits
from transformers import T5Config, T5ForConditionalGeneration

from configs.errors import InputError
from trainer.explanation.attribution import explain
from trainer.models.load import is_quantised, read_model
from trainer.models.recurrent import RecurrentForCausalLM
from trainer.optimisation.measuring import sizes
from trainer.optimisation.quantising import quantise


def quantised(family, method):
    model = a_model(family, width=64, heads=4, intermediate_size=96)
    smaller = copy.deepcopy(model)
    quantise(smaller, method)
    return model, smaller


@pytest.mark.parametrize("method", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_what_is_written_answers_the_same_once_it_is_loaded(family, method, tmp_path):
    model, smaller = quantised(family, method)
    assert is_quantised(smaller)
    assert not is_quantised(model)
    expected, whole = logits(smaller), logits(model)
    head = "lm_head" if family == "llama" else "classifier"
    assert type(smaller.get_submodule(head).weight.data) is torch.Tensor
    assert 0 < (expected - whole).abs().max() < (whole.abs().max() if method == "int4" else whole.abs().max() / 4)
    smaller.save_pretrained(tmp_path)
    assert torch.equal(logits(FAMILIES[family][2].from_pretrained(tmp_path).eval()), expected)
    ours = read_model(tmp_path, "here")
    smaller.set_attn_implementation(ours.config._attn_implementation)
    assert torch.equal(logits(ours), logits(smaller))
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") + 8
    assert (tmp_path / "model.safetensors").stat().st_size - header == sizes(smaller)["bytes"]
    assert sizes(smaller)["bytes"] < 0.6 * sizes(model)["bytes"]


def test_eight_bits_are_a_rounding_of_each_row_by_its_largest_weight():
    model, smaller = quantised("llama", "int8")
    name = "model.layers.0.mlp.up_proj"
    weight, found = model.get_submodule(name).weight, smaller.get_submodule(name).weight
    step_N1 = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((found.dequantize() - weight).abs() <= step_N1 * 0.51).all()
    assert torch.equal(model.get_input_embeddings().weight, smaller.get_input_embeddings().weight)


def test_four_bits_have_sixteen_values_for_each_group():
    model, smaller = quantised("llama", "int4")
    name = "model.layers.0.mlp.up_proj"
    weight, found = model.get_submodule(name).weight, smaller.get_submodule(name).weight.dequantize()
    assert max(len(group.unique()) for group in found.view(-1, 32)) <= 16
    step = weight.view(-1, 32).abs().amax(dim=1) / 7
    assert ((found - weight).view(-1, 32).abs().amax(dim=1) <= step).all()


def test_answers_do_not_depend_on_who_else_is_asked():
    _, smaller = quantised("llama", "int8")
    ids = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        both = smaller(input_ids=ids).logits
        alone = smaller(input_ids=ids[:1]).logits
    assert torch.allclose(both[:1], alone, atol=1e-5)


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_models_without_layers_for_it_are_refused(method):
    few = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4))
    quantise(few, method)  # which has some
    with pytest.raises(InputError, match=f"--method {method}: a GPT2LMHeadModel has no layer that torchao can take"):
        quantise(a_model("gpt2"), method)


def test_a_quantised_model_is_not_explained():
    _, smaller = quantised("bert", "int8")
    with pytest.raises(InputError, match="its weights are quantised and have no gradients; explain the model that it"):
        explain(None, None, smaller, "a text")


def test_groups_that_do_not_fit_are_smaller_or_refused():
    few = a_model("llama", width=24, heads=2)
    quantise(few, "int4")
    weight = few.model.layers[0].mlp.up_proj.weight
    assert weight.block_size[-1] == 8
    with pytest.raises(
        InputError, match=r"--method int4: .*q_proj has 12 inputs, no multiple of 8; give --method int8"
    ):
        quantise(a_model("llama", width=12), "int4")


def test_without_torchao_both_ways_are_refused(tmp_path, monkeypatch):
    _, smaller = quantised("llama", "int8")
    smaller.save_pretrained(tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr("trainer.models.load.find_spec", lambda name: None if name == "torchao" else found(name))
    for act in (lambda: read_model(tmp_path, str(tmp_path)), lambda: quantise(a_model("llama"), "int8")):
        with pytest.raises(InputError, match=r"torchao is not installed, .*pip install 'siloweave\[optimise\]'"):
            act()


def test_a_recurrent_model_keeps_its_answers(tmp_path):
    torch.manual_seed(0)
    model = RecurrentForCausalLM(RecurrentForCausalLM.config_class(vocab_size=50, hidden_size=16)).eval()
    try:
        quantise(model, "int8")
    except InputError as refused:
        assert "has no layer that torchao can take" in str(refused)
        return
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(read_model(tmp_path, "here")), expected)
