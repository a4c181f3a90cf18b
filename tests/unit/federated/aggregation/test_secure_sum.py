"""What both sides of a secure sum compute alike: its context, its bound, and vectors."""

import numpy as np
import pytest
import torch

from configs.load import load
from federated.aggregation.secure_sum import agreement, arrays_of, length_of, members, update_bound, vector
from federated.protocol import silo_pb2 as pb
from privacy.mechanism.adam_bc import AdamBC
from privacy.plan import PlanTerms
from privacy.secure_sum import SecureSum

ROSTER = {name: f"{number}" * 64 for number, name in enumerate("abc", 1)}
PLAN = PlanTerms(sampling_rate=0.05, max_grad_norm=1.0, noise_multiplier=1.0, rounds=2, steps_per_round=2, delta=1e-5)


def train_of(**changes):
    given = {"round": 1, "adapter": b"adapter", "learning_rate": 0.1, "plan_digest": "p", "base_model_digest": "b"}
    return pb.Train(**{**given, **changes}, secure=pb.Secure(roster=members(ROSTER), clip=1.0))


def digest(train=None, terms=None, coordinator="c", run_id="r", length=10):
    return agreement(train or train_of(), terms or SecureSum(), coordinator, run_id, length).digest


def test_whatever_a_silo_is_asked_for_is_in_the_context():
    found = [
        digest(),
        digest(terms=SecureSum(colluders=1)),
        digest(terms=SecureSum(min_survivors=3)),
        digest(coordinator="d"),
        digest(run_id="s"),
        digest(coordinator="cr", run_id=""),
        digest(length=11),
    ]
    changes = {
        "round": 2,
        "adapter": b"another",
        "plan_digest": "q",
        "base_model_digest": "c",
        "task": "chat",
        "learning_rate": 0.2,
        "optimizer": "sgd",
        "proximal_mu": 1.0,
        "correction": b"c",
        "frozen_below": 1,
        "frozen": b"f",
        "context_length": 8,
        "update_dtype": "int8",
        "adapter_spec": pb.AdapterSpec(rank=2),
        "task_spec": pb.TaskSpec(template="t"),
        "augmentation": pb.Augmentation(swap=0.1),
    }
    assert {*changes, "secure"} == {field.name for field in pb.Train.DESCRIPTOR.fields}
    found += [digest(train_of(**{name: value})) for name, value in changes.items()]
    assert len(set(found)) == len(found)
    assert digest() == digest(pb.Train.FromString(train_of().SerializeToString()))


def test_the_fewest_are_more_than_half_of_all_and_colluders():
    assert agreement(train_of(), SecureSum(), "c", "r", 1).min_survivors == 2
    assert agreement(train_of(), SecureSum(min_survivors=3), "c", "r", 1).min_survivors == 3
    assert agreement(train_of(), SecureSum(colluders=1), "c", "r", 1).min_survivors == 3


def test_a_vector_and_back():
    update = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array([-9, 0.5], np.float32)}
    found = vector(update, 4)
    assert found.tolist() == [-4, 0.5, 0, 1, 2, 3, 4, 4]
    assert length_of(update) == 8
    back = arrays_of(found, update)
    assert {name: array.shape for name, array in back.items()} == {"a": (2,), "b": (2, 3)}
    assert back["b"][1, 0] == 3 and back["a"][0] == -4
    for wrong in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="not finite"):
            vector({"a": np.array([wrong], np.float32)}, 1)


@pytest.mark.parametrize("optimizer", ["adam", "adam_bc"])
@pytest.mark.parametrize("steps", [1, 7, 60, 400])
def test_no_gradients_move_a_weight_by_more_than_the_bound(optimizer, steps):
    """The worst ones: by Cauchy and Schwarz those that grow from step to step by b2 / b1."""
    settings = load("tiny", [f"federated.local_steps={steps}", f"federated.optimizer={optimizer}"]).federated
    bound = update_bound(settings, PLAN, 0.0)
    growth, rate = 0.999 / 0.9, settings.learning_rate
    for drawn in (growth ** np.arange(steps), np.ones(steps), np.random.default_rng(0).standard_cauchy(steps)):
        weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        one = torch.optim.Adam([weight], rate) if optimizer == "adam" else AdamBC([weight], rate, noise_std=1e-3)
        for value in drawn:
            weight.grad = torch.tensor([value], dtype=torch.float64)
            one.step()
        assert abs(weight.item()) < bound
    moved = []
    for start in (1e-3, 1.0):  # beside AdamBC's noise of 1e-3, and far above it
        weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        one = torch.optim.Adam([weight], rate) if optimizer == "adam" else AdamBC([weight], rate, noise_std=1e-3)
        for step in range(steps):
            before = weight.item()
            weight.grad = torch.tensor([start * growth**step], dtype=torch.float64)
            one.step()
            moved.append(abs(weight.item() - before))
    assert max(moved) <= rate * (7.3 if optimizer == "adam" else 7.3 * 11**0.5)
    if steps >= 60 and optimizer == "adam":  # after many more steps the bound itself
        assert max(moved) > 0.98 * rate * 7.27 * (1 - 0.999**steps) ** 0.5


def test_the_bound_of_plain_steps_holds_for_the_noise_of_a_plan():
    settings = load("tiny", ["federated.optimizer=sgd", "federated.learning_rate=0.1", "federated.local_steps=4"])
    drawn = np.random.default_rng(0).standard_normal((4, 100_000))  # of batches of one expected unit, the smallest
    moved = 0.1 * np.abs(np.sum(1.0 + PLAN.noise_multiplier * drawn, axis=0)).max()
    assert moved < update_bound(settings.federated, PLAN, 0.0) == pytest.approx(0.1 * 4 * 20)
    assert update_bound(settings.federated, PLAN, 2.0) == pytest.approx(0.1 * 4 * 22)
