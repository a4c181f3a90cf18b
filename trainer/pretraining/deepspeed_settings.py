"""The one place where our settings become DeepSpeed's, and where a rank's process is set up for it."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.schema.pretrain import PretrainSettings
from configs.schema.schema import RunConfig
from trainer.pretraining.memory import bucket_values, placed_bytes
from trainer.rank import Rank


def deepspeed_config(
    settings: PretrainSettings, world_size: int, sizes: Sequence[int] = (), device: str = "cpu"
) -> dict[str, Any]:
    """DeepSpeed's configuration for these settings.

    Args:
        settings: the run's.
        world_size: number of ranks.
        sizes: number of values of each parameter; buffers are made to fit. Empty: DeepSpeed's defaults.
        device: ``cpu`` or ``cuda``.
    """
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if sizes:
        # DeepSpeed would reserve its 500 million values whatever the model's size.
        zero["reduce_bucket_size"] = bucket_values(sizes)
    for part, place in (("optimizer", settings.offload_optimizer), ("param", settings.offload_parameters)):
        if place != "none":
            zero[f"offload_{part}"] = {"device": place, "pin_memory": device == "cuda"}
            if place == "nvme":
                zero[f"offload_{part}"]["nvme_path"] = settings.offload_folder
    if settings.offload_parameters == "nvme" and sizes:
        zero["offload_param"]["buffer_size"] = max(sizes)
    return {
        "train_batch_size": settings.batch_size,
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(settings, world_size),
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": settings.precision == "bf16"},
        # loss_scale 0: dynamic. A step whose gradient overflows is skipped and the scale halved.
        "fp16": {"enabled": settings.precision == "fp16", "loss_scale": 0},
        # The optimizer is torch's own: no just-in-time compilation on the user's machine.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def accumulation_steps(settings: PretrainSettings, world_size: int) -> int:
    """Micro-batches of one rank in a step."""
    return settings.batch_size // (world_size * settings.micro_batch_size)


def likely_device(setting: str) -> str:
    """What ``cluster.device`` comes to on this machine, as far as can be said without asking Ray."""
    if setting == "auto":
        return "cuda" if Path("/dev/nvidia0").exists() else "cpu"
    return "cuda" if setting == "gpu" else "cpu"


def unsupported(settings: PretrainSettings, device: str) -> list[str]:
    """What these settings ask for and this machine can't do, one line each with its fix.

    Args:
        settings: the run's.
        device: ``cpu`` or ``cuda``.
    """
    lines = []
    if settings.precision == "fp16" and device == "cpu":
        lines.append("pretrain.precision is 'fp16': runs on GPUs only; give 'bf16' or 'fp32'")
    if settings.torch_compile and shutil.which(os.environ.get("CXX", "g++")) is None:
        lines.append(
            f"pretrain.torch_compile is true: there is no C++ compiler ({os.environ.get('CXX', 'g++')}); install one "
            "(Debian: `apt install g++`), or give false"
        )
    if settings.offload_folder:
        lines += _no_nvme(settings)
    return lines


def _no_nvme(settings: PretrainSettings) -> Iterator[str]:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        name = "offload_optimizer" if settings.offload_optimizer == "nvme" else "offload_parameters"
        yield (
            f"pretrain.{name} is 'nvme': DeepSpeed needs libaio with its headers (Debian: `apt install libaio-dev`); "
            "install it, or give 'cpu'"
        )
    try:
        with tempfile.TemporaryFile(dir=settings.offload_folder):
            pass
    except OSError as error:
        yield (
            f"pretrain.offload_folder is {settings.offload_folder!r}: can't be written ({error.strerror}); give a "
            "folder on a local disk"
        )


def require_supported(config: RunConfig, rank: Rank, vocab_size: int) -> None:
    """Refuses what this rank's machine can't do, before anything is built.

    Raises:
        InputError: it can't; the message names each setting and its fix.
    """
    lines = unsupported(config.pretrain, rank.device)
    if config.pretrain.offload_folder and not lines:
        lines += _no_room(config, rank, vocab_size)
    if lines:
        raise InputError("; ".join(lines))


def _no_room(config: RunConfig, rank: Rank, vocab_size: int) -> Iterator[str]:
    from trainer.models.families import parameter_sizes

    folder, sizes = config.pretrain.offload_folder, parameter_sizes(config.model, vocab_size, config.objective)
    needed = rank.local_world_size * placed_bytes(config.pretrain, sizes, rank.world_size)["nvme"]
    free = shutil.disk_usage(folder).free
    if free < needed:
        yield (
            f"pretrain.offload_folder is {folder!r}: {free / 2**30:.1f} GiB free, and this node's ranks need "
            f"{needed / 2**30:.1f}; free some space, or give another folder"
        )
