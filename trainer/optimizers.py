"""Optimizer and learning-rate schedule of pretraining."""

import math
from typing import Any

from configs.pretrain_settings import PretrainSettings


def learning_rate(settings: PretrainSettings, step: int) -> float:
    """Linear warm-up, then a cosine down to ``min_learning_rate_ratio`` of the peak."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    floor = settings.min_learning_rate_ratio
    return settings.learning_rate * (floor + (1 - floor) * cosine)


def new_optimizer(settings: PretrainSettings, model: Any) -> Any:
    """Torch's AdamW: weight decay on matrices, none on norms."""
    import torch

    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
    )
