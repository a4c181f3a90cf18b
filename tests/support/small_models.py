"""Small models of random weights, one of each family, and what they say of the same words."""

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

IDS = torch.arange(3, 19).view(2, 8)
SMALL = {"vocab_size": 50, "initializer_range": 0.3}
FAMILIES = {
    "llama": ("model.layers.1.mlp.down_proj", 24, AutoModelForCausalLM),
    "gpt2": ("transformer.h.1.mlp.c_proj", 64, AutoModelForCausalLM),
    "bert": ("bert.encoder.layer.1.output.dense", 24, AutoModelForSequenceClassification),
}
"""Of each: a layer that leads on from neurons, how many these are, and the class that loads it."""


def a_model(family, width=16, layers=2, heads=2, **others):
    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**SMALL, n_embd=width, n_layer=layers, n_head=heads, **others)).eval()
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 24}
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**{**SMALL, **sizes, "tie_word_embeddings": True, **others})).eval()
    return BertForSequenceClassification(BertConfig(**{**SMALL, **sizes, **others})).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits
