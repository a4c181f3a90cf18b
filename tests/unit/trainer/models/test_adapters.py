"""Which layers an adapter stands on: every linear one of any family but a head that shares the embedding's weight."""

import re

import pytest
import torch
from model_families import bert, classified, gpt2, llama, masked, next_token, of_family, t5, translated
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from configs.schema.pretrain import ModelSettings
from trainer.models.adapters import Adaptation, AdaptationError, adapted, add_adapter, depths, trainable
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


DEPTHS = {
    "llama": (
        llama,
        {0: r"model\.embed_tokens", 1: r"model\.layers\.0", 2: r"model\.layers\.1", 3: r"model\.norm|lm_head"},
    ),
    "gpt2": (gpt2, {0: r"transformer\.w[tp]e", 1: r"transformer\.h\.0", 2: r"transformer\.h\.1", 3: r".*ln_f|lm_head"}),
    "bert": (
        lambda: bert(AutoModelForMaskedLM),
        {0: r"bert\.embeddings", 1: r"bert\.encoder\.layer\.0", 2: r"bert\.encoder\.layer\.1", 3: r"cls"},
    ),
    "t5": (
        lambda: t5(tied=True),
        {0: "shared", 1: r"(en|de)coder\.block\.0", 2: r"(en|de)coder\.block\.1", 3: ".*final_layer_norm"},
    ),
    "lstm": (lambda: of_family("lstm"), {0: "embed_tokens", 1: r"layers\.0", 2: r"layers\.1", 3: "norm|lm_head"}),
    "llama with LoRA": (
        lambda: add_adapter(llama(), 2, 4.0, seed=0),
        {0: r".*embed_tokens", 1: r".*model\.layers\.0", 2: r".*model\.layers\.1", 3: r".*model\.norm|.*lm_head"},
    ),
}


@pytest.mark.parametrize("family", DEPTHS)
def test_embeddings_lie_lowest_then_layer_after_layer_then_what_is_above(family):
    make, expected = DEPTHS[family]
    model = make()
    found = depths(model)
    assert list(found) and found.keys() == dict(model.named_parameters()).keys()
    assert set(found.values()) == set(expected)
    for name, depth in found.items():
        assert re.match(f"({expected[depth]})\\b", name), (name, depth)


def own(model, train):
    return set(trainable(adapted(model, Adaptation(1, 1.0, train), seed=0)))


def test_parameters_of_the_model_itself_train_where_that_is_asked_for():
    assert own(llama(), "full") == {name for name, _ in llama().named_parameters()}
    assert own(llama(), "head") == {"lm_head.weight"}
    assert own(llama(tied=True), "full") == {name for name, _ in llama(tied=True).named_parameters()}
    biases = own(gpt2(), "bitfit")
    assert biases == {name for name, _ in gpt2().named_parameters() if name.endswith(".bias")}
    assert {"transformer.h.0.attn.c_attn.bias", "transformer.ln_f.bias"} < biases


def test_named_layers_alone_have_an_adapter():
    names = trainable(adapted(llama(), Adaptation(2, 4.0, targets=("v_proj", "q_proj", "lm_head")), seed=0))
    layers = block("self_attn.q_proj self_attn.v_proj", "model.layers") | {"lm_head"}
    assert set(names) == {f"base_model.model.{layer}.lora_{x}.default.weight" for layer in layers for x in "AB"}


ROUNDED = {
    "llama": (llama, next_token),
    "llama, tied": (lambda: llama(tied=True), next_token),
    "gpt2": (gpt2, next_token),
    "bert": (lambda: bert(AutoModelForMaskedLM), masked),
    "t5": (lambda: t5(tied=True), translated),
}


@pytest.mark.parametrize("family", ROUNDED)
def test_frozen_weights_in_bfloat16_leave_norms_biases_and_adapter_in_float32(family):
    make, losses_of = ROUNDED[family]
    whole, found = (adapted(make(), Adaptation(3, 6.0, base_dtype=dtype), 5) for dtype in ("float32", "bfloat16"))
    for name, value in found.named_parameters():
        expected = whole.get_parameter(name)
        if value.requires_grad or value.dim() == 1:
            assert torch.equal(value, expected), name  # the same A, too
        else:
            assert value.dtype == torch.bfloat16, name
        assert torch.equal(value, expected.to(value.dtype)), name
    with torch.no_grad():
        for model in (whole, found):
            for name, value in trainable(model).items():
                value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
    records = [torch.arange(start, start + 9) % 50 for start in (3, 11)]
    losses = [losses_of(model.eval())(records) for model in (whole, found)]
    assert losses[1].dtype == torch.float32
    assert torch.allclose(*losses, rtol=0.03)
    assert not torch.equal(*losses)
    losses[1].sum().backward()
    assert all(value.grad.any() and value.grad.dtype == torch.float32 for value in trainable(found).values())


@pytest.mark.parametrize(
    ("make", "how", "message"),
    [
        (lambda: llama(tied=True), {"train": "head"}, "output head shares the embedding's weight"),
        (gpt2, {"train": "head"}, "output head shares the embedding's weight"),
        (lambda: bert(AutoModelForSequenceClassification), {"train": "head"}, "has no output head"),
        (llama, {"train": "bitfit"}, "has no biases; give 'lora', 'full' or 'head'"),
        (llama, {"targets": ("query",)}, "'query': no linear layer of this model; it has down_proj, gate_proj, k_proj"),
        (llama, {"targets": ("q_proj", "embed_tokens")}, "'embed_tokens': no linear layer"),
        (lambda: llama(tied=True), {"targets": ("lm_head",)}, "'lm_head': the output head shares the embedding's"),
    ],
)
def test_what_a_model_has_not_got_is_refused_by_name(make, how, message):
    with pytest.raises(AdaptationError, match=message) as caught:
        adapted(make(), Adaptation(2, 4.0, **how), seed=0)
    assert "\n" not in str(caught.value)
