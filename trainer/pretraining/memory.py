"""Bytes that a rank holds for weights, gradients and optimizer, from the settings alone.

After Rajbhandari et al. 2020, section 5, and DeepSpeed's code, whose buffers add to the paper's formula. Not included:
activations, and the weights that ZeRO-3 gathers for the layer at work. ``benchmarks/memory.py`` measures it.
"""

from collections.abc import Sequence

from configs.schema.pretrain import PretrainSettings
from trainer.pretraining.optimizers import MOMENTS

_BUCKET, _PERSISTENT = 500_000_000, 100_000  # DeepSpeed's reduce_bucket_size, stage3_param_persistence_threshold


def bucket_values(sizes: Sequence[int]) -> int:
    """Values of the buffer in which gradients are reduced over the ranks."""
    return min(_BUCKET, sum(sizes))


def state_bytes(settings: PretrainSettings, sizes: Sequence[int], stage: int, world_size: int) -> dict[str, float]:
    """Bytes of one rank at the fullest moment of a step, by part, wherever they are kept.

    Args:
        settings: precision, optimizer, offload (which counts from stage 1 on).
        sizes: number of values of each parameter.
        stage: ZeRO's.
        world_size: number of ranks.
    """
    values, width = sum(sizes), 4 if settings.precision == "fp32" else 2
    shared = values / world_size
    held = shared if stage else values  # what a rank's optimizer steps on
    has_master = stage >= 1 or width == 2
    return {
        "weights": (shared if stage == 3 else values) * width,
        # Stage 1 keeps whole gradients over the micro-batches, and gives them away at the end of the step.
        "gradients": (shared if stage >= 2 else values) * width,
        # float32 ZeRO keeps one as well, beside weights of the same precision.
        "master": held * 4 if has_master else 0.0,
        "optimizer": held * 4 * MOMENTS[settings.optimizer],
        "buffers": _buffers(settings, sizes, stage, world_size, width),
    }


def _buffers(settings: PretrainSettings, sizes: Sequence[int], stage: int, world_size: int, width: int) -> float:
    """The rest of the fullest moment: reducing gradients, or stepping on float32 copies of them."""
    values = sum(sizes)
    bucket, shared = bucket_values(sizes) * width, values / world_size
    if stage == 0:
        return 4.0 * values if width == 2 else 0.0
    offloads = settings.offload_optimizer != "none"
    # The step's float32 gradients exist in the step only, but for offload, which keeps them.
    stepping, kept = (0.0, shared * 4) if offloads else (shared * 4, 0.0)
    if stage == 3:
        # The bucket is always there; small parameters are whole until the step.
        return bucket + kept + max(stepping, _small_bytes(sizes, world_size, width))
    if offloads:  # a copy of the new weights on their way back, and one at each end of a gradient on its way out
        kept += shared * width + 2 * max(sizes) * width
    # Gradients that wait while others fill the bucket: all of them, or this rank's share of the micro-batches before.
    repeats = settings.batch_size > world_size * settings.micro_batch_size
    waiting = values * width if stage == 1 else shared * width if repeats else 0.0
    fullest = max(waiting + bucket, shared * width + stepping)
    return kept + fullest - (values if stage == 1 else shared) * width


def _small_bytes(sizes: Sequence[int], world_size: int, width: int) -> float:
    """ZeRO-3 leaves small parameters and their gradients whole on every rank."""
    return 2.0 * width * sum(size for size in sizes if size < _PERSISTENT) if world_size > 1 else 0.0


def placed_bytes(settings: PretrainSettings, sizes: Sequence[int], world_size: int) -> dict[str, float]:
    """The same bytes by where they are: on the rank's device, in its node's memory, in ``pretrain.offload_folder``.

    Swap buffers of ``nvme`` are not included.
    """
    parts = state_bytes(settings, sizes, settings.zero_stage, world_size)
    found = {"none": 0.0, "cpu": 0.0, "nvme": 0.0}
    found[settings.offload_parameters] += parts.pop("weights")
    found[settings.offload_optimizer] += parts.pop("master") + parts.pop("optimizer")
    if settings.offload_optimizer != "none":  # gradients follow, but for stage 1's whole ones and the bucket
        width = 4 if settings.precision == "fp32" else 2
        stays = float(bucket_values(sizes) * width)
        if settings.zero_stage == 1:
            stays += parts["gradients"]
        stays += max(sizes) * width if settings.zero_stage < 3 else _small_bytes(sizes, world_size, width)
        found["none"] += stays
        found["cpu"] += sum(parts.values()) - stays
    else:
        found["none"] += sum(parts.values())
    return {"device": found["none"], "host": found["cpu"], "nvme": found["nvme"]}
