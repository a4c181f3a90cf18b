"""An attacker's adapters (federated/audit/hostile_adapters.py): how far one record moves a sum of clipped gradients."""

from collections.abc import Sequence
from typing import Any

import torch

from configs.schema.pretrain import ModelSettings
from federated.audit import hostile_adapters
from federated.audit.hostile_adapters import Movement
from trainer.models.adapters import add_adapter, trainable
from trainer.models.families import new_model
from trainer.tasks.task import Encoded, Task
from trainer.tasks.text import CausalTask

VOCABULARY = 50


class Words:
    """Stands in for a tokenizer."""

    eos_token_id = 0

    def __len__(self) -> int:
        return VOCABULARY


TASK = CausalTask(Words(), 128)


def model() -> Any:
    settings = ModelSettings(hidden_size=64, layers=2, heads=2, intermediate_size=96, context_length=128)
    return add_adapter(new_model(settings, VOCABULARY, seed=1), 8, 16.0, seed=2).train()


def siloweave() -> list[Movement]:
    """Through the engine's own parts, as ``siloweave audit`` does."""
    return hostile_adapters.movements(model(), TASK)


def opacus(mode: str) -> list[Movement]:
    """The same records padded to the longest, as a loader's batch is, and clipped by Opacus in one of its modes."""

    def total(net: Any, _: Task, batch: Sequence[Encoded], norm: float) -> torch.Tensor:
        return opacus_sum(net, batch, mode, norm) / norm

    return hostile_adapters.movements(model(), TASK, total)


class RecordLosses(torch.nn.Module):
    """Nats a token of each record, the only criterion that all modes take: (B, T, V) and (B, T)."""

    def __init__(self, reduction: str = "sum") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        losses_BT = torch.nn.functional.cross_entropy(
            logits_BTV.transpose(1, 2), targets_BT, ignore_index=-100, reduction="none"
        )
        losses_B: torch.Tensor = losses_BT.sum(dim=1) / (targets_BT != -100).sum(dim=1)
        return losses_B if self.reduction == "none" else losses_B.sum()


def padded(batch: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(record.ids) for record in batch)
    ids = torch.zeros((len(batch), longest), dtype=torch.long)
    targets = torch.full((len(batch), longest), -100)
    for row, record in enumerate(batch):
        ids[row, : len(record.ids)] = torch.tensor(record.ids)
        targets[row, : len(record.ids) - 1] = torch.tensor(record.ids[1:])
    return ids, targets


def opacus_sum(net: Any, batch: Sequence[Encoded], mode: str, max_grad_norm: float) -> torch.Tensor:
    """The clipped sum as float64 numbers, by the gradient sample modules and optimizers of Opacus."""
    ids, targets = padded(batch)
    parameters = trainable(net)
    formed = _ghost(net, ids, targets, max_grad_norm) if mode == "ghost" else None
    gradients = formed or _instantiated(net, ids, targets, mode, max_grad_norm)
    return torch.cat([gradients[name].double().flatten() for name in parameters])


def _wrapped(net: Any, mode: str) -> Any:
    from opacus.grad_sample import GradSampleModule, GradSampleModuleExpandedWeights

    if mode == "ew":
        return GradSampleModuleExpandedWeights(net, loss_reduction="sum")
    return GradSampleModule(net, loss_reduction="sum", strict=False, force_functorch=mode == "functorch")


def _instantiated(
    net: Any, ids: torch.Tensor, targets: torch.Tensor, mode: str, max_grad_norm: float
) -> dict[str, torch.Tensor]:
    from opacus.optimizers import DPOptimizer

    wrapped, parameters = _wrapped(net, mode), trainable(net)
    plain = torch.optim.SGD(parameters.values(), lr=1.0)
    optimizer = DPOptimizer(
        plain, noise_multiplier=0.0, max_grad_norm=max_grad_norm, expected_batch_size=1, loss_reduction="sum"
    )
    try:
        RecordLosses()(wrapped(ids).logits, targets).backward()
        optimizer.clip_and_accumulate()
        return {name: value.summed_grad.clone() for name, value in parameters.items()}
    finally:
        _cleaned(wrapped, parameters)


def _ghost(net: Any, ids: torch.Tensor, targets: torch.Tensor, max_grad_norm: float) -> dict[str, torch.Tensor]:
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

    parameters = trainable(net)
    wrapped = GradSampleModuleFastGradientClipping(net, max_grad_norm=max_grad_norm, loss_reduction="sum", strict=False)
    try:
        losses_B = RecordLosses("none")(wrapped(ids).logits, targets)
        losses_B.sum().backward(retain_graph=True)
        factors_B = wrapped.get_clipping_coef()
        net.zero_grad()
        wrapped.disable_hooks()
        (factors_B * losses_B).sum().backward()
        return {name: value.grad.clone() for name, value in parameters.items()}
    finally:
        _cleaned(wrapped, parameters)


def _cleaned(wrapped: Any, parameters: dict[str, torch.nn.Parameter]) -> None:
    if hasattr(wrapped, "remove_hooks"):
        wrapped.remove_hooks()
    for value in parameters.values():
        value.grad = None
        for name in ("grad_sample", "summed_grad", "_norm_sample", "_forward_counter"):
            if hasattr(value, name):
                delattr(value, name)
