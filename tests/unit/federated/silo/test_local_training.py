"""A silo's steps with FedProx, SCAFFOLD and a frozen A, against loops written by hand."""

import numpy as np
import pytest
import torch

from cluster.checks.estimate import adapter_parameters
from configs.load import load
from configs.schema.pretrain import ModelSettings
from federated.adapters.lora_factors import frozen
from federated.silo.local_training import LocalSettings, PrivateUpdate, public_update
from privacy.mechanism.noise import noised
from privacy.mechanism.sampler import poisson_sample
from privacy.mechanism.streams import Streams
from privacy.plan import PlanTerms
from trainer.models.adapters import add_adapter, trainable
from trainer.models.families import new_model
from trainer.tasks.task import Encoded
from trainer.tasks.text import CausalTask

PLAN = PlanTerms(
    sampling_rate=0.1, max_grad_norm=0.3, noise_multiplier=0.7, rounds=2, steps_per_round=4, delta=1e-5
).bind(100)
STREAMS = Streams(b"s" * 32, "ab" * 32)


class Letters:
    """Stands in for a tokenizer: one token a letter."""

    eos_token_id = 0

    def __len__(self):
        return 50

    @property
    def backend_tokenizer(self):
        return self

    def encode(self, text, add_special_tokens):
        return type("Encoding", (), {"ids": [1 + ord(letter) % 40 for letter in text]})


TASK = CausalTask(Letters(), 16)
RECORDS = [
    Encoded((0, *np.random.default_rng(i).integers(1, 50, size=3 + i % 9).tolist()), 5, truncated=False)
    for i in range(32)
]


def lora_model(*, freeze=False):
    settings = ModelSettings(hidden_size=16, layers=1, heads=2, intermediate_size=24, context_length=16)
    model = add_adapter(new_model(settings, 50, seed=1), 3, 6.0, seed=2)
    for name, value in trainable(model).items():
        value.requires_grad = not (freeze and frozen(name))
    return model.train()


def arrays_of(model, seed=None):
    rng = np.random.default_rng(seed)
    parameters = {name: value.detach().numpy().copy() for name, value in sorted(trainable(model).items())}
    if seed is None:
        return parameters
    return {name: rng.normal(scale=0.05, size=array.shape).astype(np.float32) for name, array in parameters.items()}


def by_hand(model, adapter, noise_std, rate, extra):
    """Plain SGD on gradients that are summed one record at a time; what is added comes after the noise."""
    weights = {name: torch.from_numpy(array.copy()) for name, array in adapter.items()}
    for step in range(4):
        parameters = trainable(model)
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(weights[name])
        sums = {name: torch.zeros_like(value) for name, value in parameters.items()}
        for index in poisson_sample(PLAN, STREAMS, step, 32):
            loss = TASK.record_losses(model, TASK.collate([RECORDS[index]])).sum()
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            length = torch.sqrt(sum(gradient.square().sum() for gradient in gradients)).item()
            factor = min(1.0, 0.3 / (length + 1e-6)) if noise_std else 1.0
            for name, gradient in zip(parameters, gradients, strict=True):
                sums[name] += factor * gradient
        for name, total in sums.items():
            release = noised(total, noise_std, STREAMS, step, name) if noise_std else total
            weights[name] = weights[name] - rate * (release / 10 + extra(name, weights[name]))
    return {name: (weights[name] - torch.from_numpy(adapter[name])).numpy() for name in weights}


def private_update(plan, streams, model, task, adapter, records, settings):
    return PrivateUpdate(plan, model, task, adapter, settings).run(streams, [(record,) for record in records])


def in_the_clear(plan, streams, model, task, adapter, records, settings):
    return public_update(plan, streams, model, task, adapter, [(record,) for record in records], settings)


@pytest.mark.parametrize(("update", "noise_std"), [(private_update, PLAN.noise_std), (in_the_clear, 0.0)])
@pytest.mark.parametrize(("mu", "corrected"), [(0.0, False), (3.0, False), (0.0, True), (3.0, True)])
def test_the_steps_are_those_written_by_hand(update, noise_std, mu, corrected):
    model = lora_model()
    adapter, correction = arrays_of(model, 1), arrays_of(model, 2) if corrected else {}

    def extra(name, weight):
        return mu * (weight - torch.from_numpy(adapter[name])) + torch.from_numpy(
            correction.get(name, np.zeros(1, "f4"))
        )

    settings = LocalSettings(0.1, "sgd", 8, "bookkeeping", mu, correction)
    found = update(PLAN, STREAMS, model, TASK, adapter, RECORDS, settings)
    expected = by_hand(model, adapter, noise_std, 0.1, extra)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-5)


def test_what_is_added_after_the_noise_leaves_the_noise_as_it_was():
    """One step from the shared adapter: the proximal term is 0 there, and a correction moves it by exactly its size."""
    one = PLAN.model_copy(update={"terms": PLAN.terms.model_copy(update={"steps_per_round": 1})})
    model = lora_model()
    adapter, correction = arrays_of(model, 1), arrays_of(model, 2)
    plain, proximal, corrected = (
        private_update(one, STREAMS, model, TASK, adapter, RECORDS, LocalSettings(0.1, "sgd", 8, "bookkeeping", *more))
        for more in ((), (3.0,), (0.0, correction))
    )
    for name in adapter:
        assert np.array_equal(plain[name], proximal[name])
        np.testing.assert_allclose(corrected[name], plain[name] - 0.1 * correction[name], atol=1e-6)


@pytest.mark.parametrize("adapters", ["average", "ffa"])
def test_the_plan_tells_how_many_parameters_train(adapters):
    config = load("tiny", [f"federated.adapters={adapters}"])
    model = add_adapter(new_model(config.model, config.tokenizer.vocab_size, 0), config.federated.lora_rank, 8.0, 0)
    counted = [value.numel() for name, value in trainable(model).items() if adapters == "average" or not frozen(name)]
    assert adapter_parameters(config) == sum(counted)


def test_a_frozen_a_stays_and_b_trains_under_every_clipping_method():
    for method in ("bookkeeping", "opacus_hooks"):
        model = lora_model(freeze=True)
        held = {name: value.detach().clone() for name, value in model.named_parameters() if not value.requires_grad}
        adapter = arrays_of(model)
        assert adapter
        assert not any(frozen(name) for name in adapter)
        settings = LocalSettings(0.1, "sgd", 8, method)
        found = private_update(PLAN, STREAMS, model, TASK, adapter, RECORDS, settings)
        expected = by_hand(model, adapter, PLAN.noise_std, 0.1, lambda *_: 0)
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-5)
        assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in held.items())
