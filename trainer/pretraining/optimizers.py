"""Optimizer and learning-rate schedule of pretraining."""

import math
from typing import Any

from configs.schema.pretrain import PretrainSettings

# How many float32 values each optimizer keeps for each value of a parameter.
MOMENTS = {"adamw": 2, "adam": 2, "momentum": 1, "sgd": 0}


def learning_rate(settings: PretrainSettings, step: int) -> float:
    """The schedule, a pure function of the step: linear warm-up, then a share of the peak.

    Args:
        settings: peak, warm-up, schedule and its floor.
        step: 0 to ``steps`` - 1; the floor is what the step after the last would have.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    floor = settings.min_learning_rate_ratio
    return settings.learning_rate * (floor + (1 - floor) * _share(settings, step))


def _share(settings: PretrainSettings, step: int) -> float:
    """1 at the peak, 0 at the floor."""
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "wsd":  # warm-up, stable, decay (Hu et al. 2024, MiniCPM)
        decay_steps = max(1, round(settings.decay_share * settings.steps))
        return min(1.0, (settings.steps - step) / decay_steps)
    progress = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    return 1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def new_optimizer(settings: PretrainSettings, model: Any) -> Any:
    """Torch's optimizer: weight decay on matrices, none on vectors (norms, biases)."""
    from torch import optim

    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    if settings.optimizer in ("sgd", "momentum"):
        return optim.SGD(
            groups, lr=settings.learning_rate, momentum=settings.beta1 if settings.optimizer == "momentum" else 0.0
        )
    adam = optim.AdamW if settings.optimizer == "adamw" else optim.Adam
    return adam(groups, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2))
