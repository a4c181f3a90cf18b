"""Book-keeping and Opacus' modes against a loop over single records, which is slow and obviously right."""

import copy
from functools import partial

import pytest
import torch
from model_families import (
    VOCABULARY,
    bert,
    classified,
    gpt2,
    llama,
    lora,
    masked,
    next_token,
    of_family,
    t5,
    translated,
)
from per_record import assert_equal, clipped, fixed, length, one_by_one, oracle
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from configs.errors import InputError
from privacy.clipping.clipping import clipping
from privacy.clipping.gradients import ByParameter
from privacy.clipping.self_check import prove_per_record_gradients
from trainer.models.adapters import trainable

TOKENS = 12
IDS = torch.randint(1, VOCABULARY, (8, TOKENS), generator=torch.Generator().manual_seed(0))
IDS[0] = 7  # one token only: everything repeats
RECORDS = list(IDS)


def middle_norm(model, losses, records):
    return torch.stack([length(gradients) for gradients in one_by_one(model, losses, records)]).median().item()


def check(model, losses, records=RECORDS, tolerance=1e-4, method="bookkeeping"):
    """Half of the records are clipped, half are not; the prove_per_record_gradients agrees too."""
    norm = middle_norm(model, losses, records)
    with clipping(model, norm, method) as clipper:
        prove_per_record_gradients(clipper, losses, records[:3])
        clipper.accumulate(losses, records[:5])
        clipper.accumulate(losses, records[5:])
        found = clipper.take()
    assert_equal(found, oracle(model, losses, records, fixed(norm)), tolerance)
    assert all(parameter.requires_grad for parameter in trainable(model).values())


# Layers


class OneLayer(nn.Module):
    """A trainable layer between an embedding and a fixed projection."""

    def __init__(self, layer, frozen_input=True):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6).requires_grad_(not frozen_input)
        self.layer = layer
        self.mix = nn.Parameter(torch.randn(TOKENS), requires_grad=False)

    def losses(self, records):
        hidden_BTN = self.layer(self.embedding(torch.stack(records)))
        return (hidden_BTN.tanh().sum(-1) * self.mix).sum(-1).square() + hidden_BTN.square().mean((1, 2))


class Own(nn.Module):
    """A layer on tokens rather than on vectors."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding

    def losses(self, records):
        return self.embedding(torch.stack(records)).cumsum(1).tanh().sum((1, 2)).square()


LAYERS = {
    "linear": lambda: nn.Linear(6, 3),
    "linear, wide": lambda: nn.Linear(6, 4096),
    "linear without bias": lambda: nn.Linear(6, 5, bias=False),
    "layer norm": lambda: nn.LayerNorm(6),
    "layer norm without bias": lambda: nn.LayerNorm(6, bias=False),
    "layer norm without weight": lambda: nn.Sequential(nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 6)),
    "rms norm": lambda: nn.RMSNorm(6),
    "rms norm of transformers": lambda: LlamaRMSNorm(6),
    "conv1d": lambda: Conv1D(4, 6),
    "conv1d, wide": lambda: Conv1D(4096, 6),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("frozen_input", [True, False])
def test_a_layer_gives_the_sum_of_single_records(name, frozen_input):
    torch.manual_seed(1)
    layer = LAYERS[name]()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    model = OneLayer(layer, frozen_input)
    check(model, model.losses)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 7}])
def test_an_embedding_with_repeated_tokens_and_padding(options):
    torch.manual_seed(1)
    model = Own(nn.Embedding(VOCABULARY, 4, **options))
    check(model, model.losses)


def test_a_linear_layer_without_positions_or_with_two_dimensions_of_them():
    torch.manual_seed(1)
    layer = nn.Linear(TOKENS, 3)
    check(layer, lambda records: layer(torch.stack(records).float() / VOCABULARY).square().sum(-1))
    check(layer, lambda records: layer(torch.stack(records).float()[:, None, None].expand(-1, 2, 5, -1)).sum((1, 2, 3)))


def test_a_norm_holds_where_positions_cancel():
    """Two positions with opposite gradients: what is left is small beside what float32 has added and taken away."""
    layer = nn.Linear(512, 512, bias=False)
    values = torch.randn(512, generator=torch.Generator().manual_seed(0))
    record = torch.stack([values, values * (1 + 1e-4)]) * 100
    sign = torch.tensor([1.0, -1.0])[:, None]

    def losses(records):
        return (layer(torch.stack(records)) * sign * 100).sum((1, 2))

    exact = next(one_by_one(layer, losses, [record]))
    with clipping(layer, 1.0) as clipper:
        norm = clipper.accumulate(losses, [record, record])[0].item()
    assert norm >= 0.999 * length(exact).item()


# Models


MODELS = {
    "llama": (llama, next_token),
    "llama, tied": (lambda: llama(tied=True), next_token),
    "gpt2, tied, broadcast positions": (gpt2, next_token),
    "bert classifier, broadcast positions": (lambda: bert(AutoModelForSequenceClassification), classified),
    "bert, tied": (lambda: bert(AutoModelForMaskedLM), masked),
    "t5, tied, relative bias": (lambda: t5(tied=True), translated),
    "t5": (lambda: t5(tied=False), translated),
    **{
        f"{family}, as pretrained here": (partial(of_family, family), losses)
        for family, losses in {
            "gpt2": next_token,
            "bert": masked,
            "t5": translated,
            **dict.fromkeys(("rnn", "lstm", "gru"), next_token),
        }.items()
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_full_fine_tuning_gives_the_sum_of_single_records(name):
    make, losses = MODELS[name]
    model = make()
    check(model, losses(model))


LORA = {
    "llama": (llama, next_token, ["q_proj", "down_proj", "lm_head"]),
    "gpt2": (gpt2, next_token, ["c_attn", "c_proj"]),
    "bert": (lambda: bert(AutoModelForSequenceClassification), classified, ["query", "dense"]),
    "t5": (lambda: t5(tied=True), translated, ["q", "v", "wo"]),
    "lstm": (lambda: of_family("lstm"), next_token, ["input_gates", "hidden_gates", "lm_head"]),
}


@pytest.mark.parametrize("name", LORA)
def test_lora_gives_the_sum_of_single_records(name):
    make, losses, targets = LORA[name]
    model = lora(make(), targets)
    check(model, losses(model))


def test_bfloat16_with_norms_in_float64():
    """Against the gradients of the same bfloat16 pass; what is compared is bfloat16's own rounding."""
    model = llama(dtype=torch.bfloat16)
    check(model, next_token(model), tolerance=3e-2)
    with clipping(model, 0.01) as clipper:
        norms = clipper.accumulate(next_token(model), RECORDS)
        sums = clipper.take()
    assert norms.dtype == torch.float64
    assert all(value.dtype == torch.float64 for value in sums.values())
    assert length(sums) <= 0.01 * len(RECORDS)


@pytest.mark.parametrize("method", ["opacus_hooks", "opacus_ew"])
def test_opacus_modes_give_the_same_sum(method):
    model = lora(llama(), ["q_proj", "down_proj", "lm_head"])
    check(model, next_token(model), method=method)
    theirs = clipped(model, next_token(model), [RECORDS], 0.05, method=method)
    ours = clipped(model, next_token(model), [RECORDS], 0.05)
    assert_equal(ours, {name: value.double() for name, value in theirs.items()})
    leftovers = {name for parameter in model.parameters() for name in vars(parameter)}
    assert not leftovers & {"grad_sample", "_norm_sample"}


def test_an_opacus_mode_that_does_not_know_the_model_says_so_in_one_line():
    model = gpt2()
    with clipping(model, 1.0, "opacus_hooks") as clipper, pytest.raises(InputError, match="set another one"):
        prove_per_record_gradients(clipper, next_token(model), RECORDS[:3])


# What clipping promises


def test_the_automatic_function_normalises_and_never_exceeds_the_norm():
    model = llama()
    found = clipped(model, next_token(model), [RECORDS], 0.3, automatic=True)
    assert_equal(found, oracle(model, next_token(model), RECORDS, lambda size: 0.3 / (size + 0.01)))
    alone = clipped(model, next_token(model), [RECORDS[:1]], 0.3, automatic=True)
    assert 0.25 < length(alone) <= 0.3


@pytest.mark.parametrize("automatic", [False, True])
def test_one_record_moves_the_sum_by_the_norm_at_most(automatic):
    model = llama()
    for record in RECORDS[:4]:
        assert length(clipped(model, next_token(model), [[record]], 0.05, automatic=automatic)) <= 0.05


@pytest.mark.parametrize("size", [1, 3, 8])
def test_micro_batches_do_not_change_the_sum(size):
    model = llama(tied=True)
    whole = clipped(model, next_token(model), [RECORDS], 0.3)
    parts = clipped(model, next_token(model), [RECORDS[at : at + size] for at in range(0, 8, size)], 0.3)
    assert_equal(parts, {name: value.double() for name, value in whole.items()}, tolerance=1e-5)


@pytest.mark.parametrize("method", ["bookkeeping", "opacus_hooks"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -float("inf")])
def test_a_record_without_a_finite_gradient_adds_nothing(bad, method):
    model = lora(llama(), ["q_proj", "lm_head"])
    plain = next_token(model)

    def losses(records):
        spoiled = torch.tensor([bad if torch.equal(record, RECORDS[2]) else 1.0 for record in records])
        return plain(records) * spoiled

    found = clipped(model, losses, [RECORDS], 0.3, method=method)
    expected = clipped(model, plain, [RECORDS[:2] + RECORDS[3:]], 0.3)
    assert_equal(found, {name: value.double() for name, value in expected.items()})
    only_bad = clipped(model, losses, [[RECORDS[2]]], 0.3, method=method)
    assert not any(value.any() for value in only_bad.values())


def test_a_gradient_whose_square_float32_can_not_hold_is_clipped_as_any():
    model = lora(llama(), ["q_proj", "lm_head"])
    plain = next_token(model)
    found = clipped(model, lambda records: 3e30 * plain(records), [RECORDS[:1]], 0.3)
    direction = next(one_by_one(model, plain, RECORDS[:1]))
    assert_equal(found, {name: 0.3 * value / length(direction) for name, value in direction.items()})


def test_no_record_gives_a_zero_sum_of_every_parameter():
    model = llama()
    sums = clipped(model, next_token(model), [], 0.3)
    assert sums.keys() == trainable(model).keys()
    assert not any(value.any() for value in sums.values())


def test_the_model_is_left_as_it_was():
    model = t5(tied=True)
    before = copy.deepcopy(model.state_dict())
    check(model, translated(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("compute_bias" in vars(module) for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


# What is refused


class Mixing(nn.Module):
    """Subtracts the batch's mean: one record's loss depends on the others."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        y = self.layer(x)
        return (y - y.mean(dim=0)).square().sum(dim=1)


class Tied(nn.Module):
    """Uses one weight twice, the second time where no layer is called."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return functional.linear(self.layer(x).tanh(), self.layer.weight).square().sum(dim=1)


ROWS = list(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("method", ["bookkeeping", "opacus_hooks"])
@pytest.mark.parametrize("kind", [Mixing, Tied])
def test_the_probe_refuses_what_would_break_the_guarantee(kind, method):
    model = kind().train()
    with clipping(model, 1.0, method) as clipper, pytest.raises(InputError, match=r"parameter layer.weight"):
        prove_per_record_gradients(clipper, lambda batch: model(torch.stack(batch)), ROWS)


def test_a_probe_that_shows_nothing_is_no_proof():
    model = nn.Linear(4, 4)
    with clipping(model, 1.0) as clipper, pytest.raises(InputError, match="no gradient"):
        prove_per_record_gradients(clipper, lambda batch: 0.0 * model(torch.stack(batch)).sum(dim=1), ROWS)


def test_a_broadcast_layer_is_refused_by_name():
    class Broadcast(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return (self.layer(torch.ones(1, 4)) * x).sum(dim=1)

    model = Broadcast()
    with clipping(model, 1.0) as clipper, pytest.raises(InputError, match=r"layer.weight, layer.bias.*of 1 for 5"):
        prove_per_record_gradients(clipper, lambda batch: model(torch.stack(batch)), ROWS)


def test_an_unknown_layer_is_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.PReLU())
    with pytest.raises(InputError, match=r"layer 1 \(PReLU\).*parameter 1.weight"), clipping(model, 1.0):
        pass


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_an_embedding_that_mixes_records_is_refused(options):
    with pytest.raises(InputError, match="layer model: an embedding"), clipping(nn.Embedding(9, 2, **options), 1.0):
        pass


def test_coarse_matrix_products_are_refused():
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(InputError, match="'medium'"), clipping(nn.Linear(2, 2), 1.0):
            pass
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_probe_passes_where_a_gradient_cancels_and_leaves_no_trace():
    wrapped = lora(llama(), ["q_proj", "lm_head"])
    with torch.no_grad():  # equal rows in the head's B: A's gradient cancels to rounding errors
        trainable(wrapped)["base_model.model.lm_head.lora_B.default.weight"].fill_(1e-3)
    before = copy.deepcopy(wrapped.state_dict())
    with clipping(wrapped, 1.0) as clipper:
        prove_per_record_gradients(clipper, next_token(wrapped), RECORDS[:3])
        assert not any(value.any() for value in clipper.take().values())
    assert all(torch.equal(value, before[name]) for name, value in wrapped.state_dict().items())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_active_dropout_is_refused(attention):
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        attention_dropout=0.1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
    with clipping(model, 1.0) as clipper, pytest.raises(InputError, match="dropout is active"):
        prove_per_record_gradients(clipper, next_token(model), RECORDS[:3])


class Statistics(nn.Module):
    """A frozen layer that normalises over the batch while training."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 1)
        self.norm = nn.BatchNorm1d(8, affine=False)

    def forward(self, x):
        return self.second(self.norm(self.first(x)).tanh()).square().sum(dim=1)


@pytest.mark.parametrize("method", ["bookkeeping", "opacus_hooks"])
def test_batch_statistics_of_a_frozen_layer_are_refused(method):
    model = Statistics().train()
    with clipping(model, 1.0, method) as clipper, pytest.raises(InputError):
        prove_per_record_gradients(clipper, lambda batch: model(torch.stack(batch)), ROWS)


def test_a_buffer_that_a_forward_pass_changes_is_refused():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1)
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x):
            self.seen += x.detach().sum(dim=0)
            return self.layer(x).square().sum(dim=1)

    model = Counting().train()
    with clipping(model, 1.0) as clipper, pytest.raises(InputError, match="buffer seen"):
        prove_per_record_gradients(clipper, lambda batch: model(torch.stack(batch)), ROWS)


def test_mixing_that_shows_only_away_from_zero_weights_is_refused():
    """A branch that starts at zero, as LoRA's B does, and mixes records once it has moved."""

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.branch = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
            nn.init.zeros_(self.branch.weight)

        def forward(self, x):
            return (self.layer(x) + self.branch(x).square().mean(dim=0)).square().sum(dim=1)

    model = Branch().train()
    with clipping(model, 1.0) as clipper, pytest.raises(InputError, match=r"parameter (layer|branch).weight"):
        prove_per_record_gradients(clipper, lambda batch: model(torch.stack(batch)), ROWS)


def test_wrong_norms_are_refused_even_where_gradients_are_right(monkeypatch):
    right = ByParameter.squared_norms
    monkeypatch.setattr(ByParameter, "squared_norms", lambda self: right(self) / 4)
    model = nn.Linear(4, 4)
    with clipping(model, 1.0) as clipper, pytest.raises(InputError, match="the norms over all parameters"):
        prove_per_record_gradients(clipper, lambda batch: model(torch.stack(batch)).square().sum(dim=1), ROWS)


def test_autocast_around_the_clipping_is_refused_and_inside_the_losses_is_not():
    model = llama()
    losses = next_token(model)
    with clipping(model, 1.0) as clipper:
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match="autocast"):
            clipper.accumulate(losses, RECORDS)

        def inside(records):
            with torch.autocast("cpu", torch.bfloat16):
                return losses(records)

        clipper.accumulate(inside, RECORDS)
        assert length(clipper.take()) <= len(RECORDS)


def test_a_model_whose_inputs_want_gradients_is_refused_in_words():
    model = lora(llama(), ["q_proj"])
    model.enable_input_require_grads()
    with clipping(model, 1.0) as clipper, pytest.raises(InputError, match="enable_input_require_grads"):
        prove_per_record_gradients(clipper, next_token(model), RECORDS[:3])
