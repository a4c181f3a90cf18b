"""The DeepSpeed engine of one rank: how it is built, what each step sets, and whether a step was good."""

from __future__ import annotations

from typing import Any

from configs.errors import InputError
from configs.schema.schema import RunConfig
from trainer.pretraining.deepspeed_settings import deepspeed_config, require_supported
from trainer.pretraining.optimizers import hold_back, learning_rate, new_optimizer
from trainer.rank import Rank


def build_engine(config: RunConfig, rank: Rank, vocab_size: int) -> Any:
    """The engine around a model at its random start and its optimizer.

    Raises:
        InputError: the settings ask for what this rank's machine, or this architecture, can't do.
    """
    require_supported(config, rank, vocab_size)
    import deepspeed
    from deepspeed.checkpoint import constants

    from trainer.models.families import new_model
    from trainer.pretraining.onednn import use_onednn

    settings = config.pretrain
    model = new_model(config.model, vocab_size, config.run.seed, settings.dropout, config.objective).train()
    if onednn_computes(config, rank):
        use_onednn(model)
    # With this, DeepSpeed's own converter reads our commits.
    version = {constants.UNIVERSAL_CHECKPOINT_VERSION_KEY: constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE}
    setattr(model, constants.UNIVERSAL_CHECKPOINT_INFO, version)
    sizes = [parameter.numel() for parameter in model.parameters()]
    frozen = hold_back(model, config)
    if settings.activation_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise InputError(
                f"pretrain.activation_checkpointing is true: a {type(model).__name__} of transformers can't; give false"
            )
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=new_optimizer(settings, model),
        config=deepspeed_config(settings, rank.world_size, sizes, rank.device),
    )
    if settings.zero_stage == 0 and settings.precision != "fp32":
        _take_back_first_step(engine.optimizer)
    engine.frozen = frozen
    if settings.torch_compile:
        engine.compile()
    return engine


def onednn_computes(config: RunConfig, rank: Rank) -> bool:
    """Whether oneDNN computes the linear layers: on all ranks, or on none, which they decide together.

    Lower precisions go to oneDNN anyway, and the compiler brings products of its own.
    """
    from torch import distributed

    from trainer.pretraining.onednn import mkl_holds_back

    settings = config.pretrain
    if rank.device != "cpu" or settings.precision != "fp32" or settings.torch_compile:
        return False
    found = [mkl_holds_back()] * rank.world_size
    if rank.world_size > 1:
        distributed.all_gather_object(found, mkl_holds_back())
    return all(found)


def _take_back_first_step(optimizer: Any) -> None:
    """DeepSpeed's wrapper of these settings makes a step while it is built, so that moments are allocated.

    Its gradient is zero (``FP16_UnfusedOptimizer.initialize_optimizer_states``), but it decays the matrices' master
    weights, with adam by a whole learning rate each, and the bias correction counts it.
    """
    optimizer.state.clear()
    optimizer.refresh_fp32_params()


def set_step(engine: Any, config: RunConfig, step: int, rank: Rank) -> None:
    """Sets what a step has of its own, all of which depends on the step and not on the past.

    That is its learning rate, what is frozen, and its dropout masks.
    """
    from trainer.pretraining.dropout import seed_dropout

    engine.frozen.below = config.stage_at(step).frozen_below
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(config.pretrain, step)
        group["frozen"] = group.get("depth", 0) < engine.frozen.below  # commits of before have no depth
    if config.pretrain.dropout:
        seed_dropout(config.run.seed, step, rank.rank)


def gradient_trouble(engine: Any) -> str | None:
    """DeepSpeed skips a step whose gradient is not finite, on all ranks: training would stand still in silence.

    Under fp16 that is how the loss scale is found, and DeepSpeed raises by itself when there is none.
    """
    return "the gradient is not finite" if engine.skipped_steps and not engine.fp16_enabled() else None


def weight_trouble(engine: Any) -> str | None:
    """A gradient that was not finite shows in the next step's loss only: too late for a commit in between."""
    import torch
    from torch import distributed

    # Under ZeRO-3 a parameter is empty between steps, and ds_tensor is this rank's share of it.
    own = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.module.parameters()]
    finite = torch.stack([values.detach().isfinite().all() for values in own]).all()
    broken = (~finite).float()
    distributed.all_reduce(broken)
    return "a weight is not finite" if broken.item() else None
