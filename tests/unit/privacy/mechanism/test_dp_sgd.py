"""Clipping and the engine against a loop over single records, which is slow and obviously right."""

import math

import numpy as np
import pytest
import torch
from evaluations import alone

from configs.errors import InputError
from configs.schema.pretrain import ModelSettings
from privacy.mechanism.adam_bc import AdamBC
from privacy.mechanism.dp_sgd import PrivateTraining
from privacy.mechanism.noise import noised
from privacy.mechanism.sampler import poisson_sample
from privacy.mechanism.streams import Streams
from privacy.plan import PlanTerms
from trainer.models.adapters import adapter_weights, add_adapter, trainable
from trainer.models.families import new_model
from trainer.tasks.task import Encoded
from trainer.tasks.text import CausalTask

DIGEST = "ab" * 32


class Words:
    """Stands in for a tokenizer: the task needs its end-of-text id and the number of its tokens here."""

    eos_token_id = 0

    def __len__(self):
        return 50


TASK = CausalTask(Words(), 16)


def record(seed, length=10):
    ids = np.random.default_rng(seed).integers(1, 50, size=length)
    return Encoded((0, *ids.tolist()), characters=length, truncated=False)


RECORDS = [record(i, 3 + i % 9) for i in range(32)]


def lora_model():
    settings = ModelSettings(hidden_size=16, layers=2, heads=2, intermediate_size=24, context_length=16)
    model = add_adapter(new_model(settings, 50, seed=1), 3, 6.0, seed=2)
    with torch.no_grad():  # B is zero at the start, and with it A's gradient: make both matter
        for name, value in trainable(model).items():
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    return model.train()


def losses(model, batch):
    return TASK.record_losses(model, TASK.collate(batch))


def clipped_one_by_one(model, batch, norm):
    """The oracle: one ordinary backward a record."""
    parameters = trainable(model)
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for one in batch:
        gradients = torch.autograd.grad(losses(model, [one]).sum(), list(parameters.values()))
        length = torch.sqrt(sum(gradient.square().sum() for gradient in gradients))
        factor = min(1.0, norm / (length.item() + 1e-6))
        for name, gradient in zip(parameters, gradients, strict=True):
            total[name] += factor * gradient
    return total


PLAN = PlanTerms(
    sampling_rate=0.1, max_grad_norm=0.3, noise_multiplier=0.7, rounds=2, steps_per_round=4, delta=1e-5
).bind(100)


def training(model, plan=PLAN, optimizer=torch.optim.Adam, **options):
    return PrivateTraining(
        plan,
        model,
        optimizer(list(trainable(model).values()), lr=1e-2, **options),
        unit_losses=lambda batch: losses(model, batch),
        shape_of=TASK.shape,
        made_up=TASK.made_up,
        synthetic=RECORDS[:3],
    )


STREAMS = Streams(b"s" * 32, DIGEST)


def run(model, records, seed=b"s" * 32, **options):
    training(model, **options).run(Streams(seed, DIGEST), alone(records))
    return adapter_weights(model)


def test_the_engine_is_dp_sgd_written_by_hand():
    found = run(lora_model(), RECORDS)
    model, streams = lora_model(), Streams(b"s" * 32, DIGEST)
    optimizer = torch.optim.Adam(list(trainable(model).values()), lr=1e-2)
    for step in range(4):
        batch = [RECORDS[i] for i in poisson_sample(PLAN, streams, step, 32)]
        sums = clipped_one_by_one(model, batch, 0.3)
        for name, value in trainable(model).items():
            value.grad = noised(sums[name], PLAN.noise_std, streams, step, name) / (0.1 * 100)
        optimizer.step()
    for name, value in adapter_weights(model).items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not():
    first, again, other = (run(lora_model(), RECORDS, seed=seed) for seed in (b"s" * 32, b"s" * 32, b"t" * 32))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_the_micro_batch_size_changes_no_bit():
    found = [run_in(lora_model(), micro_batch_size) for micro_batch_size in (16, 3, 1)]
    assert all(torch.equal(other[name], found[0][name]) for other in found for name in found[0])


def run_in(model, micro_batch_size):
    steps = training(model)
    steps.micro_batch_size = micro_batch_size
    steps.run(STREAMS, alone(RECORDS))
    return adapter_weights(model)


def test_no_data_at_all_still_takes_every_noised_step():
    before = adapter_weights(lora_model())
    after = run(lora_model(), [])
    assert all((after[name] != before[name]).any() for name in before)


def test_the_normaliser_is_the_declared_count_not_the_data():
    """With one record instead of 32, the noise in the update has the same size: nothing shows how many there are."""
    plan = PlanTerms(
        sampling_rate=0.1, max_grad_norm=1e-6, noise_multiplier=1e6, rounds=1, steps_per_round=1, delta=1e-5
    )
    updates = []
    for records in (RECORDS, RECORDS[:1]):
        model = lora_model()
        before = adapter_weights(model)
        after = run(model, records, plan=plan.bind(100), optimizer=torch.optim.SGD)
        updates.append(torch.cat([(after[name] - before[name]).flatten() for name in before]) / 1e-2)
    assert updates[0].std().item() == pytest.approx(1.0 / 10, rel=0.05)
    torch.testing.assert_close(updates[0], updates[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad, AdamBC])
def test_a_charges_steps_are_the_same_bits_whatever_the_process_has_drawn(optimizer):
    options = {"optimizer": optimizer, **({"noise_std": PLAN.noise_std / 10} if optimizer is AdamBC else {})}
    first = run(lora_model(), RECORDS, **options)
    torch.manual_seed(99)
    again = run(lora_model(), RECORDS, **options)
    assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("size", [1e12, 1e19, 1e30])
def test_a_proof_whose_numbers_are_not_finite_is_none(size):
    model = lora_model()
    with torch.no_grad():
        for value in trainable(model).values():
            value.mul_(size)
    with pytest.raises(InputError):
        training(model).prove()


def test_a_proof_counts_for_one_run(monkeypatch):
    steps, proofs, prove = training(lora_model()), [], PrivateTraining.prove
    monkeypatch.setattr(PrivateTraining, "prove", lambda self: proofs.append(1) or prove(self))
    steps.prove()
    steps.run(STREAMS, alone(RECORDS))
    assert len(proofs) == 1
    steps.run(STREAMS, alone(RECORDS))
    assert len(proofs) == 2


def test_adam_freed_of_the_noise_is_the_papers_formula():
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = AdamBC([weight], lr=0.1, noise_std=0.5, betas=(0.8, 0.9), floor=0.01)
    first = second = torch.zeros(2, dtype=torch.float64)
    expected = weight.detach().double().clone()
    for number, gradient in enumerate(([3.0, 0.1], [2.0, -0.2], [4.0, 0.3]), 1):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        exact = torch.tensor(gradient, dtype=torch.float64)
        first, second = 0.8 * first + 0.2 * exact, 0.9 * second + 0.1 * exact**2
        signal = torch.clamp(second / (1 - 0.9**number) - 0.25, min=0.01 * 0.25)
        expected -= 0.1 * first / (1 - 0.8**number) / signal.sqrt()
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_adam_freed_of_the_noise_tells_signal_from_noise_where_adam_does_not():
    """A small steady gradient under large noise: Adam's steps shrink by noise over signal, the corrected ones don't."""
    generator = torch.Generator().manual_seed(0)
    moved = {}
    for name, make in (("adam", torch.optim.Adam), ("corrected", AdamBC)):
        weight = torch.nn.Parameter(torch.zeros(2000))
        options = {"noise_std": 1.0} if make is AdamBC else {}
        optimizer = make([weight], lr=1e-3, **options)
        for _ in range(200):
            weight.grad = 0.1 + torch.randn(2000, generator=generator)
            optimizer.step()
        moved[name] = -weight.detach().mean().item()
    assert moved["corrected"] > 2 * moved["adam"]


def test_a_closure_and_a_missing_noise_are_refused():
    weight = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="noise_std is 0"):
        AdamBC([weight], lr=0.1, noise_std=0.0)
    with pytest.raises(ValueError, match="closure"):
        AdamBC([weight], lr=0.1, noise_std=1.0).step(lambda: 0.0)


QUANTILE = PlanTerms(
    sampling_rate=0.5, max_grad_norm=0.3, clipping_function="quantile", target_quantile=0.5, noise_multiplier=0.7,
    rounds=2, steps_per_round=6, delta=1e-5,
).bind(100)  # fmt: skip


def test_quantile_clipping_is_the_papers_rule_by_hand():
    found = training(lora_model(), plan=QUANTILE)
    found.run(STREAMS, alone(RECORDS))
    model, streams, norm = lora_model(), Streams(b"s" * 32, DIGEST), 0.3
    optimizer = torch.optim.Adam(list(trainable(model).values()), lr=1e-2)
    for step in range(6):
        batch = [RECORDS[i] for i in poisson_sample(QUANTILE, streams, step, 32)]
        below = sum(0.5 if size <= norm else -0.5 for size in lengths(model, batch))
        sums = clipped_one_by_one(model, batch, norm)
        for name, value in trainable(model).items():
            value.grad = noised(sums[name], QUANTILE.noise_std * norm / 0.3, streams, step, name) / 50
        optimizer.step()
        share = 0.5 + noised(torch.tensor([below]), 50 / 20, streams, step, "").item() / 50
        norm *= math.exp(-0.2 * (share - 0.5))
    assert found.max_grad_norm == pytest.approx(norm, rel=1e-4)
    assert found.max_grad_norm != 0.3
    for name, value in adapter_weights(model).items():
        torch.testing.assert_close(adapter_weights(found.model)[name], value, rtol=1e-3, atol=1e-5)


def lengths(model, batch):
    parameters = list(trainable(model).values())
    for one in batch:
        gradients = torch.autograd.grad(losses(model, [one]).sum(), parameters)
        yield torch.sqrt(sum(gradient.square().sum() for gradient in gradients)).item()


@pytest.mark.parametrize("start", [1e-3, 1e3])
def test_quantile_clipping_finds_the_norm_from_afar(start):
    """Most records are out of the sampler's reach of chance: the norm ends near the middle of their norms."""
    plan = QUANTILE.terms.model_copy(update={"max_grad_norm": start, "steps_per_round": 150}).bind(64)
    found = training(lora_model(), plan=plan, optimizer=NoStep)
    found.run(STREAMS, alone(RECORDS * 2))
    middle = torch.tensor(list(lengths(lora_model(), RECORDS))).median().item()
    assert middle / 2 < found.max_grad_norm < middle * 2


class NoStep(torch.optim.SGD):
    """Leaves the weights where they are, so that the norms stay."""

    def step(self, closure=None):
        pass


def test_the_automatic_function_reaches_the_engine():
    plan = PLAN.terms.model_copy(update={"clipping_function": "automatic"}).bind(100)
    fixed, automatic = run(lora_model(), RECORDS), run(lora_model(), RECORDS, plan=plan)
    assert not all(torch.equal(fixed[name], automatic[name]) for name in fixed)
