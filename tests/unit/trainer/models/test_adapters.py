"""Which layers an adapter stands on: every linear one of any family but a head that shares the embedding's weight."""

import pytest
import torch
from model_families import bert, classified, gpt2, llama, masked, next_token, t5, translated
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from configs.schema.pretrain import ModelSettings
from trainer.models.adapters import add_adapter, trainable
from trainer.models.families import new_model

BEFORE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


def settled():
    settings = ModelSettings(hidden_size=16, layers=2, heads=2, intermediate_size=24, context_length=16)
    return new_model(settings, 50, seed=1)


def as_before(model, rank, alpha, seed):
    """The adapter as it was while the eight layers of a Llama were listed by name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=list(BEFORE), lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        wrapped = get_peft_model(model, config)
    wrapped.peft_config["default"].target_modules = sorted(BEFORE)
    return wrapped


@pytest.mark.parametrize("make", [settled, llama], ids=["ours", "llama"])
def test_a_llamas_adapter_is_the_same_bytes_as_when_its_layers_were_listed(make, tmp_path):
    found, expected = add_adapter(make(), 3, 6.0, seed=5), as_before(make(), 3, 6.0, seed=5)
    assert type(found) is type(expected)
    assert [*trainable(found)] == [*trainable(expected)]  # in the same order, too
    for name, value in trainable(expected).items():
        assert torch.equal(trainable(found)[name], value), name
    for name, model in (("found", found), ("expected", expected)):
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
    files = {path.name for path in (tmp_path / "expected").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    for file in files:
        assert (tmp_path / "found" / file).read_bytes() == (tmp_path / "expected" / file).read_bytes(), file


def block(layers, place):
    return {f"{place}.{number}.{layer}" for number in range(2) for layer in layers.split()}


ATTENTION = "SelfAttention.q SelfAttention.k SelfAttention.v SelfAttention.o"
SELF = "attention.self.query attention.self.key attention.self.value"
ENCODER = f"{SELF} attention.output.dense intermediate.dense output.dense"
T5 = {
    *block(" ".join(f"layer.0.{name}" for name in ATTENTION.split()), "encoder.block"),
    *block("layer.1.DenseReluDense.wi layer.1.DenseReluDense.wo", "encoder.block"),
    *block(" ".join(f"layer.0.{name}" for name in ATTENTION.split()), "decoder.block"),
    *block(" ".join(f"layer.1.{name}" for name in ATTENTION.replace("Self", "EncDec").split()), "decoder.block"),
    *block("layer.2.DenseReluDense.wi layer.2.DenseReluDense.wo", "decoder.block"),
}
LLAMA = block("self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj", "model.layers") | block(
    "mlp.gate_proj mlp.up_proj mlp.down_proj", "model.layers"
)
FAMILIES = {
    "llama": (llama, next_token, LLAMA | {"lm_head"}),
    "llama, tied": (lambda: llama(tied=True), next_token, LLAMA),
    "gpt2": (
        gpt2,
        next_token,
        block("attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj", "transformer.h"),
    ),
    "bert": (
        lambda: bert(AutoModelForMaskedLM),
        masked,
        block(ENCODER, "bert.encoder.layer") | {"cls.predictions.transform.dense"},
    ),
    "bert classifier": (
        lambda: bert(AutoModelForSequenceClassification),
        classified,
        block(ENCODER, "bert.encoder.layer") | {"bert.pooler.dense", "classifier"},
    ),
    "t5": (lambda: t5(tied=True), translated, T5),  # this release of transformers ties its head in any case
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_a_family_has_an_adapter_and_nothing_else_trains(family):
    make, losses_of, layers = FAMILIES[family]
    records = [torch.arange(start, start + 9) % 50 for start in (3, 11)]
    base = make().eval()
    before = losses_of(base)(records).detach()
    model = add_adapter(base, 3, 6.0, seed=5).eval()
    weights = trainable(model)
    assert set(weights) == {f"base_model.model.{layer}.lora_{x}.default.weight" for layer in layers for x in "AB"}
    assert torch.equal(losses_of(model)(records), before)  # B is zero at the start
    losses_of(model)(records).sum().backward()
    assert all(value.grad.any() for name, value in weights.items() if "lora_B" in name)
