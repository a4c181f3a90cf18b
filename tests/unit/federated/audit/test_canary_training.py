"""An audit's training on a real base model: what canaries touch, what is scored, and that a broken engine shows."""

import dataclasses

import numpy as np
import pytest
import torch

from configs.errors import PolicyRefusal, SiloweaveError
from federated.audit import canary_training
from federated.audit.canary_training import BLACK_BOX, GRADIENT, WHITE_BOX, AuditSettings, AuditTraining
from federated.audit.membership import infer_membership
from privacy.audit.bound import REFERENCE_PLAN
from privacy.audit.canaries import NO_CANARY
from privacy.mechanism.streams import SEED_BYTES
from trainer.data.tokenizer import load_tokenizer
from trainer.models.adapters import add_adapter, trainable
from trainer.models.load import load_model
from trainer.scoring.record_losses import record_losses
from trainer.tasks.text import CausalTask

SETTINGS = AuditSettings(
    gradient_canaries=2000,
    example_canaries=0,
    example_tokens=8,
    record_count=2000,
    learning_rate=0.02,
    micro_batch_size=16,
)


@pytest.fixture(autouse=True)
def certain(monkeypatch):
    """Coins and canaries that are the same in every session: an honest engine is warned of once in 30,000 audits."""
    drawn, generator = np.random.default_rng(1), np.random.default_rng
    monkeypatch.setattr(canary_training, "fair_coins", lambda count: drawn.random(count) < 0.5)
    monkeypatch.setattr(np.random, "default_rng", lambda *seed: generator(*seed) if seed else drawn)


def training(model, settings=SETTINGS, **changes):
    task = CausalTask(load_tokenizer(model), 64)
    background = [task.encode(f"a public sentence, number {number}") for number in range(100)]
    adapted = add_adapter(load_model(model), 4, 8.0, seed=0)
    return AuditTraining(REFERENCE_PLAN.model_copy(update=changes), settings, adapted, task, background, "ab" * 32)


def run(audit):
    steps = []
    audit.train(lambda: steps.append(1), lambda number: bytes([number]) * SEED_BYTES)
    assert len(steps) == audit.terms.steps
    return audit.findings()


def test_gradient_canaries_have_all_of_the_error_where_they_are_alone():
    """That the engine passes so, and fails with too little noise, tests/e2e/test_audit.py shows."""
    assert SETTINGS.modes(REFERENCE_PLAN) == {GRADIENT: (250, 1.0)}


def test_a_gradient_canary_touches_its_own_coordinate_and_nothing_else(tiny_model):
    audit = training(tiny_model)
    unit = (audit.task.encode(""), 7)
    parameters = trainable(audit._whole)
    gradients = torch.autograd.grad(audit._losses([unit]).sum(), list(parameters.values()))
    for name, gradient in zip(parameters, gradients, strict=True):
        if name == "probe.layer.weight":
            assert gradient[0, 7] == 10 * REFERENCE_PLAN.max_grad_norm
            assert gradient.count_nonzero() == 1
        else:
            assert not gradient.any()
    record = (audit.background[0], NO_CANARY)
    assert audit._losses([record, unit])[0].item() == pytest.approx(
        audit.task.record_losses(audit.model, audit.task.collate([record[0]])).item(), rel=1e-5
    )


def test_all_ways_of_looking_share_the_error_and_read_released_values_only(tiny_model):
    settings = dataclasses.replace(SETTINGS, gradient_canaries=400, example_canaries=40)
    audit = training(tiny_model, settings, rounds=2, steps_per_round=3, sampling_rate=0.2)
    found = run(audit)
    assert [one.mode for one in found] == [GRADIENT, WHITE_BOX, BLACK_BOX]
    assert sum(one.share for one in found) == pytest.approx(1.0)
    assert len(audit.gradients) == len(audit.weights) == 6
    # White box: the inner products with each canary's own gradient at the released weights, one by one.
    expected = np.zeros(40)
    for weights, gradients in zip(audit.weights, audit.gradients, strict=True):
        with torch.no_grad():
            for name, value in trainable(audit._whole).items():
                value.copy_(weights[name])
        for index, record in enumerate(audit._examples):
            loss = audit.task.record_losses(audit.model, audit.task.collate([record])).sum()
            names = [name for name in trainable(audit._whole) if name.startswith("model.")]
            own = torch.autograd.grad(loss, [trainable(audit._whole)[name] for name in names])
            expected[index] += sum((a * gradients[name]).sum().item() for name, a in zip(names, own, strict=True))
    np.testing.assert_allclose(audit._white_box_scores(), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    shown = audit.exposure()
    assert 0 <= shown["bits_in"] <= shown["bits_in_largest"] <= np.log2(1025)


def test_an_audit_that_diverged_is_an_error(tiny_model):
    audit = training(tiny_model)
    with torch.no_grad():
        next(iter(trainable(audit.model).values())).fill_(torch.inf)
    with pytest.raises(SiloweaveError, match="diverged"):
        audit.findings()


def test_losses_come_in_the_records_order(tiny_model):
    audit = training(tiny_model)
    records = [audit.task.encode("word " * (1 + number * 7 % 5)) for number in range(9)]
    alone = [record_losses(audit.model, audit.task, [record], 1)[0] for record in records]
    np.testing.assert_allclose(record_losses(audit.model, audit.task, records, 4), alone, rtol=1e-4)


def test_membership_inference_needs_public_data(tiny_run):
    private = tiny_run.config("data.private.public=false", "evaluate.without_dp=false")
    with pytest.raises(PolicyRefusal, match=r"data.private.public = true") as refusal:
        infer_membership(private, tiny_run.model, {"federated": tiny_run.directory / "federated"})
    assert refusal.value.rule == "public"


def test_membership_inference_reads_as_many_members_as_others(tiny_run, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tiny_run.state))
    found = infer_membership(tiny_run.config(), tiny_run.model, {"federated": tiny_run.directory / "federated"})
    assert found["simulation_only"]
    for attack in ("loss", "loss_against_base"):
        figures = found["federated"][attack]
        assert figures["members"] == figures["others"] == 6 * 20
        assert 0.2 < figures["auc"] < 0.8
