"""Attention heads that a model loses: those that move nothing go first, and transformers loads what is left."""

import copy
from operator import attrgetter

import pytest
import torch
from small_models import FAMILIES, IDS, SMALL, a_model, logits
from transformers import Olmo2Config, Olmo2ForCausalLM, T5Config, T5ForConditionalGeneration

from configs.errors import InputError
from trainer.models.load import read_model
from trainer.optimisation.heads import prune_heads
from trainer.optimisation.layers import rows_of
from trainer.optimisation.measuring import sizes

OUT = {
    "llama": "model.layers.{}.self_attn.o_proj",
    "gpt2": "transformer.h.{}.attn.c_proj",
    "bert": "bert.encoder.layer.{}.attention.output.dense",
}


def with_silent_heads(family, silent, **others):
    """A model of four heads whose heads ``silent`` lead nowhere, in every layer."""
    model = a_model(family, heads=4, **others)
    with torch.no_grad():
        for layer in range(2):
            rows_of(attrgetter(OUT[family].format(layer))(model), out=True).view(4, 4, -1)[list(silent)] = 0.0
    return model


@pytest.mark.parametrize("silent", [(0, 2), (1, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_that_say_nothing_are_those_that_go(family, silent):
    model = with_silent_heads(family, silent)
    smaller = copy.deepcopy(model)
    prune_heads(smaller, 0.5)
    assert torch.allclose(logits(smaller), logits(model), atol=1e-5)
    before, after = sizes(model), sizes(smaller)
    assert (after["bytes"] < before["bytes"]) == (family == "llama")
    assert (after["zeros"] > before["zeros"] + 0.02) == (family != "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_loads_what_is_left(family, tmp_path):
    model = a_model(family, heads=4)
    whole = logits(model)
    prune_heads(model, 0.5)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    assert not torch.allclose(expected, whole, atol=1e-3)
    assert torch.allclose(logits(FAMILIES[family][2].from_pretrained(tmp_path).eval()), expected, atol=1e-5)
    assert torch.allclose(logits(read_model(tmp_path, "here")), expected, atol=1e-5)


def test_heads_that_share_keys_go_together():
    model = with_silent_heads("llama", (0, 1), num_key_value_heads=2)
    expected = logits(model)
    prune_heads(model, 0.5)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (2, 1, 4)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    with pytest.raises(InputError, match=r"--share 0\.99: of 1 groups of attention heads that is none"):
        prune_heads(model, 0.99)


@pytest.mark.parametrize(("share", "left"), [(0.2, 4), (0.4, 4), (0.6, 2), (0.8, 1), (0.99, 1)])
def test_so_many_heads_stay_as_a_configuration_may_name(share, left):
    model = a_model("llama", width=24, heads=6)  # 5 heads of a width of 24 would not load
    if share == 0.2:
        with pytest.raises(InputError, match="that is none"):
            prune_heads(model, 0.01)
    prune_heads(model, share)
    assert model.config.num_attention_heads in (left, 3)
    assert 24 % model.config.num_attention_heads == 0


def test_what_is_written_with_a_cache_is_what_is_written_without_one():
    model = with_silent_heads("llama", (2, 3), num_key_value_heads=2)
    prune_heads(model, 0.5)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    written = [model.generate(IDS, **settings, use_cache=use) for use in (True, False)]
    assert torch.equal(*written)


def test_a_family_whose_heads_are_not_known_is_refused():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4))
    few = {**SMALL, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 16}
    olmo = Olmo2ForCausalLM(Olmo2Config(**few, pad_token_id=0))  # its norms are as wide as all heads together
    for model in (t5, olmo):
        with pytest.raises(InputError, match=f"--method heads: not known for a {type(model).__name__}"):
            prune_heads(model, 0.5)
