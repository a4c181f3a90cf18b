"""What one record adds to a sum depends on that record alone, bit for bit: whoever is beside it, in whatever order.

Sums are of whole steps of a grid, and so they are equal to the last bit, or something has leaked from one record into
another one's share.
"""

import numpy as np
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
from per_record import alike_here
from torch import nn
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from configs.errors import InputError
from configs.schema.pretrain import ModelSettings
from federated.audit.hostile_adapters import ADAPTERS, movements, rounding
from privacy.clipping.clipping import clipping
from privacy.clipping.independence import Together
from trainer.models.adapters import add_adapter, trainable
from trainer.models.families import new_model
from trainer.pretraining.onednn import use_onednn
from trainer.tasks.task import Encoded
from trainer.tasks.text import CausalTask


class Words:
    """Stands in for a tokenizer: the task needs its end-of-text id and the number of its tokens here."""

    eos_token_id = 0

    def __len__(self):
        return VOCABULARY


TASK = CausalTask(Words(), 48)


def causal_model(kind):
    settings = ModelSettings(hidden_size=32, layers=2, heads=2, intermediate_size=48, context_length=48)
    model = new_model(settings, VOCABULARY, seed=1)
    model = add_adapter(model, 4, 8.0, seed=2) if kind != "full" else model
    if kind == "lora, oneDNN":
        use_onednn(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in trainable(model).items():
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return model.train()


class Sums:
    """Sums of clipped gradients of some records, to the last bit."""

    def __init__(self, model, losses, shape_of, made_up, norm=0.3, method="bookkeeping"):
        self.model, self.losses, self.shape_of, self.made_up = model, losses, shape_of, made_up
        self.norm, self.method, self.sizes, self.norms = norm, method, [], []

    def of(self, batch, micro_batch_size=16):
        self.norms = []
        with clipping(self.model, self.norm, self.method) as clipper:
            together = Together(clipper, self.losses, self.shape_of, self.made_up, micro_batch_size)
            for units in together.cut(batch):
                self.sizes.append(len(units))
                self.norms += clipper.accumulate(self.losses, units).tolist()
            return torch.cat([value.flatten() for value in clipper.take().values()])

    def check(self, batches, sizes=(16, 5, 1)):
        """Each batch's sum is the sum of its records alone, in every order and cut, and so are the norms."""
        for batch in batches:
            alone, norms = 0, []
            for record in batch:
                alone = alone + self.of([record])
                norms += self.norms
            assert alone.any()
            for size in sizes:
                order = np.random.default_rng(size).permutation(len(batch))
                assert torch.equal(self.of([batch[index] for index in order], size), alone)
                assert sorted(self.norms) == sorted(norms)


def batches_of(record, seeds=2):
    """Batches of different sizes and neighbours."""
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        yield [record(int(number), int(rng.integers(2, 47))) for number in rng.integers(1000, size=7 + 13 * seed)]


def text(number, length):
    rng = np.random.default_rng(number)
    return Encoded(tuple(rng.integers(1, VOCABULARY, size=length).tolist()), length, truncated=False)


@pytest.mark.parametrize("kind", ["lora", "lora, oneDNN", "full"])
def test_causal_training(kind):
    model = causal_model(kind)

    def losses(units):
        return TASK.record_losses(model, TASK.collate(units))

    sums = Sums(model, losses, TASK.shape, TASK.made_up)
    sums.check(batches_of(text))


def fixed_length(model, losses, length=12, **options):
    generator = torch.Generator().manual_seed(0)

    def made_up(_, number):
        return list(torch.randint(1, VOCABULARY, (number, length), generator=generator))

    return Sums(model, losses(model), lambda _: length, made_up, **options)


FAMILIES = {
    "llama": (llama, next_token, ["q_proj", "down_proj", "lm_head"]),
    "gpt2": (gpt2, next_token, ["c_attn", "c_proj"]),
    "bert": (lambda: bert(AutoModelForSequenceClassification), classified, ["query", "dense"]),
    "bert, masked": (lambda: bert(AutoModelForMaskedLM), masked, None),
    "t5": (lambda: t5(tied=False), translated, ["q", "v", "wo"]),
    "t5, tied": (lambda: t5(tied=True), translated, None),
    "t5, gated": (lambda: of_family("t5"), translated, ["q", "v", "wi_0"]),
    "gru": (lambda: of_family("gru"), next_token, ["input_gates", "hidden_gates", "lm_head"]),
    "lstm": (lambda: of_family("lstm"), next_token, ["input_gates", "hidden_gates"]),
    "rnn": (lambda: of_family("rnn"), next_token, ["hidden_gates"]),
}


@pytest.mark.parametrize("training", ["full", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name, training):
    make, losses, targets = FAMILIES[name]
    if training == "lora" and targets is None:
        targets = ["v"] if "t5" in name else ["value"]
    model = lora(make(), targets) if training == "lora" else make()
    records = list(torch.randint(1, VOCABULARY, (19, 12), generator=torch.Generator().manual_seed(1)))
    sums = fixed_length(model, losses)
    sums.check([records], sizes=(16, 3))
    # So many are proved to be the same together as alone.
    assert max(sums.sizes) > 1 or not alike_here(model, sums.losses, records[:2])


@pytest.mark.parametrize("method", ["opacus_hooks", "opacus_ew"])
def test_opacus_modes(method):
    model = lora(llama(), ["q_proj", "down_proj", "lm_head"])
    records = list(torch.randint(1, VOCABULARY, (19, 12), generator=torch.Generator().manual_seed(1)))
    fixed_length(model, next_token, method=method).check([records], sizes=(16, 3))


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(threads):
    """Of 16 x 16 x 344 numbers three threads' shares end within vectors: one record moved others' shares by 1.6 C."""
    settings = ModelSettings(hidden_size=128, layers=2, heads=2, intermediate_size=344, context_length=16)
    model = add_adapter(new_model(settings, VOCABULARY, seed=1), 8, 16.0, seed=2).train()
    task = CausalTask(Words(), 16)
    with torch.no_grad():
        rounding(trainable(model))
    sums = Sums(model, lambda units: task.record_losses(model, task.collate(units)), task.shape, task.made_up)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sums.check([[text(20 * batch + number, 12) for number in range(16)] for batch in range(4)], sizes=(16,))
    finally:
        torch.set_num_threads(before)
    assert 16 in sums.sizes


# Before a unit's gradient was formed by itself, and what it adds bounded exactly, one record moved this sum by 3.8 C
# (overflow), 2.8 C (rounding) and 4.0 C (underflow): by its own share, and by others' shares, changed by its padding.
def test_no_adapter_lets_a_record_move_more_than_its_own_share():
    settings = ModelSettings(hidden_size=64, layers=2, heads=2, intermediate_size=96, context_length=128)
    model = add_adapter(new_model(settings, VOCABULARY, seed=1), 8, 16.0, seed=2).train()
    before = {name: value.detach().clone() for name, value in trainable(model).items()}
    found = movements(model, CausalTask(Words(), 128))
    assert [movement.adapter for movement in found] == list(ADAPTERS)
    for movement in found:
        assert 0.1 < movement.moved <= 1, movement
        assert movement.beside_its_own == 0, movement
        assert movement.holds
    assert all(torch.equal(value, before[name]) for name, value in trainable(model).items())


# What may not be computed together


class Slightly(nn.Module):
    """Mixes records by less than the engine's first proof can see, and only where there are several."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x_BN):
        y_BM = self.layer(x_BN)
        return (y_BM + 1e-6 * y_BM.mean(dim=0)).square().sum(dim=1)


def rows(number, seed=0):
    return list(torch.randn(number, 4, generator=torch.Generator().manual_seed(seed)))


def of_rows(model):
    return Sums(model, lambda batch: model(torch.stack(batch)), len, lambda _, number: rows(number, seed=1))


def test_records_that_mix_by_their_last_bits_are_computed_alone():
    sums = of_rows(Slightly())
    found = sums.of(rows(20))
    assert sums.sizes == [1] * 20
    assert torch.equal(found, sum(sums.of([row]) for row in rows(20)))


def test_an_operation_that_may_round_a_record_by_its_place_is_asked_for_one_record_at_a_time():
    """The last numbers of a thread's share are computed by other code, and few of them show it."""

    class Exponential(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x_BN):
            return self.layer(x_BN).exp().sum(dim=1)

    sums = of_rows(Exponential())
    sums.check([rows(20)], sizes=(16,))
    assert set(sums.sizes) == {1}


def test_units_that_show_no_gradient_prove_nothing():
    model = nn.Linear(4, 1)
    sums = Sums(model, lambda batch: 0.0 * model(torch.stack(batch)).sum(1), len, lambda _, number: rows(number))
    sums.of(rows(4))
    assert sums.sizes == [1] * 4


def test_units_of_different_shapes_are_never_together():
    model = causal_model("lora")
    seen = []

    def losses(units):
        seen.append({TASK.shape(unit) for unit in units})
        return TASK.record_losses(model, TASK.collate(units))

    Sums(model, losses, TASK.shape, TASK.made_up).of(next(iter(batches_of(text))))
    assert len({frozenset(lengths) for lengths in seen}) == 3
    assert all(len(lengths) == 1 for lengths in seen)


def test_a_proof_is_made_once_for_a_model_and_leaves_its_weights():
    model = causal_model("lora")
    before = {name: value.detach().clone() for name, value in trainable(model).items()}
    calls = []

    def made_up(length, number):
        calls.append((length, number))
        return TASK.made_up(length, number)

    sums = Sums(model, lambda units: TASK.record_losses(model, TASK.collate(units)), TASK.shape, made_up)
    batch = [text(number, 9) for number in range(8)]
    sums.of(batch)
    first = list(calls)
    sums.of(batch)
    assert calls == first
    assert all(torch.equal(value, before[name]) for name, value in trainable(model).items())


def test_a_records_padding_depends_on_its_own_length_alone():
    lengths = {2: 16, 15: 16, 16: 16, 17: 32, 40: 48, 47: 48, 48: 48}
    assert {length: TASK.shape(text(0, length)) for length in lengths} == lengths
    for task, length in [
        (TASK, 16),
        (TASK, 32),
        (TASK, 48),
        (CausalTask(Words(), 30), 30),
        (CausalTask(Words(), 33), 33),
    ]:
        assert {task.shape(unit) for unit in task.made_up(length, 16)} == {length}
    assert CausalTask(Words(), 30).shape(text(0, 20)) == 30  # no longer than the context


def test_a_device_that_gives_other_bits_when_asked_again_is_refused():
    model, turn = causal_model("lora"), iter(range(100))

    def losses(units):
        return TASK.record_losses(model, TASK.collate(units)) * (1 + 2.0**-20 * next(turn))

    with clipping(model, 1.0) as clipper, pytest.raises(InputError, match=r'other bits .*silo.device to "cpu"'):
        Together(clipper, losses, TASK.shape, TASK.made_up, 16).proved(16)


@pytest.mark.parametrize("most", [1, 4, 16])
def test_as_many_units_as_allowed_are_computed_together(most):
    model = causal_model("lora")
    with clipping(model, 1.0) as clipper:
        together = Together(
            clipper, lambda units: TASK.record_losses(model, TASK.collate(units)), TASK.shape, TASK.made_up, most
        )
        assert together.proved(16) == most
