"""Optimizer and learning-rate schedule of pretraining, and what a stage holds back from both."""

import math
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from configs.errors import InputError
from configs.schema.pretrain import PretrainSettings
from configs.schema.schema import RunConfig
from configs.schema.stages import frozen_below, stage_at

# How many float32 values each optimizer keeps for each value of a parameter.
MOMENTS = {"adamw": 2, "adam": 2, "momentum": 1, "sgd": 0}


def learning_rate(settings: PretrainSettings, step: int) -> float:
    """The schedule, a pure function of the step: linear warm-up, then a share of the peak.

    A stage with a learning rate of its own has a schedule of its own steps.

    Args:
        settings: peak, warm-up, schedule and its floor.
        step: 0 to ``steps`` - 1; the floor is what the step after the last would have.
    """
    index, first = stage_at([stage.steps for stage in settings.stages], step) if settings.stages else (0, 0)
    if settings.stages and (peak := settings.stages[index].learning_rate):
        own = {"stages": (), "steps": settings.stages[index].steps, "learning_rate": peak}
        return learning_rate(settings.model_copy(update=own), step - first)
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
    """Torch's optimizer: weight decay on matrices, none on vectors (norms, biases).

    What stages freeze together is a group, whose ``depth`` is that of its lowest parameter. A step leaves the groups
    out whose ``frozen`` is true: they keep weights and moments, bit for bit.
    """
    from torch import optim

    groups = _groups(settings, model)
    if settings.optimizer in ("sgd", "momentum"):
        momentum = settings.beta1 if settings.optimizer == "momentum" else 0.0
        return _leaving_out(optim.SGD(groups, lr=settings.learning_rate, momentum=momentum))
    adam = optim.AdamW if settings.optimizer == "adamw" else optim.Adam
    return _leaving_out(adam(groups, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2)))


def _groups(settings: PretrainSettings, model: Any) -> list[dict[str, Any]]:
    from trainer.models.adapters import depths

    bounds = sorted({0, *(frozen_below(stage.frozen) for stage in settings.stages)})
    found: dict[tuple[bool, int], list[Any]] = defaultdict(list)
    depth_of = depths(model)
    for name, parameter in model.named_parameters():
        found[parameter.ndim < 2, bounds[bisect_right(bounds, depth_of[name]) - 1]].append(parameter)
    return [
        {"params": found[key], "weight_decay": 0.0 if key[0] else settings.weight_decay, "depth": key[1]}
        for key in sorted(found)
    ]


def _leaving_out(optimizer: Any) -> Any:
    """DeepSpeed steps on groups of its own making, one by one or all at once: each has what it was made of."""
    held: list[list[dict[str, Any]]] = []

    def before(*_: Any) -> None:
        held.append(optimizer.param_groups)
        optimizer.param_groups = [group for group in optimizer.param_groups if not group.get("frozen")]

    def after(*_: Any) -> None:
        optimizer.param_groups = held.pop()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return optimizer


@dataclass
class Frozen:
    """What is frozen now.

    Attributes:
        below: the depth below which it lies.
    """

    below: int = 0

    def held_back(self, gradient: Any, depth: int) -> Any:
        """The gradient, or zeros: it would count in the norm that all gradients are clipped by."""
        return gradient.new_zeros(gradient.shape) if depth < self.below else gradient


def hold_back(model: Any, config: RunConfig) -> Frozen:
    """Makes gradients of what is frozen zero; does nothing to a model of which no stage freezes anything.

    DeepSpeed goes on seeing a gradient of every parameter. Under ZeRO it counts on them: what it has cut up and laid
    out at the start stays as it is from stage to stage, and so does a commit.

    Raises:
        InputError: a stage freezes more layers than there are.
    """
    from trainer.models.adapters import depths

    frozen, depth_of = Frozen(), depths(model)
    most = max(stage.frozen_below for stage in config.stages)
    if most > max(depth_of.values()):
        raise InputError(
            f"pretrain.stages: {most - 1} layers are frozen, and {config.model.config!r} has "
            f"{max(depth_of.values()) - 1}; give at most that"
        )
    for name, parameter in model.named_parameters():
        if depth_of[name] < most:
            parameter.register_hook(lambda gradient, depth=depth_of[name]: frozen.held_back(gradient, depth))
    return frozen
