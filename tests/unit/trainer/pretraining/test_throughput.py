"""Operations against torch's own counter, and peaks by the names that drivers give."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from configs.load import load
from trainer.models.families import new_model
from trainer.objectives.causal import next_token_nats
from trainer.objectives.span_corruption import lengths
from trainer.pretraining.throughput import (
    Throughput,
    counted_flops,
    flops_per_token,
    matmul_parameters,
    peak_flops,
)
from trainer.rank import Rank

RANK = Rank(0, 2, 0, 2, "127.0.0.1", 0, "cpu", 1)


@pytest.mark.parametrize("overrides", [[], ["model.layers=1", "model.hidden_size=64"]])
def test_the_formula_is_what_torch_counts(overrides):
    config = load("tiny", overrides)
    model = new_model(config.model, 512, seed=0)
    batch = torch.randint(512, (2, config.model.context_length))
    with FlopCounterMode(display=False) as counter:
        next_token_nats(model, batch).backward()
    expected = flops_per_token(model, config.model.context_length) * batch.numel()
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("family", ["gpt2", "bert", "rnn", "gru", "lstm"])
def test_the_formula_holds_for_other_families(family):
    config = load("tiny", [f"model.family={family}"])
    model = new_model(config.model, 512, seed=0, objective=config.objective)
    batch = torch.randint(512, (2, config.model.context_length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=batch).logits.sum().backward()
    expected = flops_per_token(model, config.model.context_length) * batch.numel()
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_an_encoder_and_a_decoder_are_counted_on_what_each_of_them_reads():
    config = load("tiny", ["model.family=t5"])
    model = new_model(config.model, 512, seed=0, objective=config.objective)
    tokens, (read, written) = config.model.context_length, lengths(config.model.context_length)
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=torch.ones(3, read).long(), decoder_input_ids=torch.ones(3, written).long()).logits
        logits.sum().backward()
    assert counted_flops(config, 512, tokens) == counter.get_total_flops() / (3 * tokens)
    assert (read + written) < 1.3 * tokens


def test_embeddings_count_only_where_they_are_the_head_too():
    from transformers import LlamaConfig, LlamaForCausalLM

    def model(*, tied):
        shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=100, tie_word_embeddings=tied, **shape))

    head = 100 * 8
    assert matmul_parameters(model(tied=False)) == matmul_parameters(model(tied=True)) == head + 4 * 8 * 8 + 3 * 8 * 16


def test_a_model_without_attention_has_no_attention_term():
    model = torch.nn.LSTM(8, 8)
    assert flops_per_token(model, 1000) == 6 * 2 * (4 * 8) * 8


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_are_found_by_the_device_name(name, peak):
    assert peak_flops(name, "bf16") == peak
    assert peak_flops(name, "fp32") is None


def test_figures_of_a_cpu_have_no_share_of_a_peak():
    model = torch.nn.Linear(1000, 1000, bias=False)
    figures = Throughput(model, load("tiny"), RANK).figures(tokens=1000, context_length=64, seconds=2.0)
    assert figures["gflop_per_s"] == pytest.approx(6 * 1e6 * 1000 / 2 / 1e9)
    assert (figures["mfu"], figures["gpu_memory_bytes"]) == (None, None)
    assert 0 < figures["memory_bytes"] <= figures["peak_memory_bytes"]
