"""The one place where our settings become DeepSpeed's, and where a rank's process is set up for it."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from configs.pretrain_settings import PretrainSettings


@dataclass(frozen=True)
class Rank:
    """One rank's place in the gang.

    Attributes:
        rank: 0 to world_size - 1.
        world_size: number of ranks.
        local_rank: rank inside its node.
        local_world_size: ranks of its node.
        master_address: host of rank 0.
        master_port: rendezvous port, fresh for every start.
        device: ``cpu`` or ``cuda``.
        threads: torch threads.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_address: str
    master_port: int
    device: str
    threads: int


def deepspeed_config(settings: PretrainSettings, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for these settings."""
    return {
        "train_batch_size": settings.batch_size,
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(settings, world_size),
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": {"stage": settings.zero_stage},
        "bf16": {"enabled": settings.precision == "bf16"},
        # The optimizer is torch's own: no just-in-time compilation on the user's machine.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def accumulation_steps(settings: PretrainSettings, world_size: int) -> int:
    """Micro-batches of one rank in a step."""
    return settings.batch_size // (world_size * settings.micro_batch_size)


def state_bytes(parameters: int, stage: int, world_size: int, precision: str) -> dict[str, float]:
    """Bytes a rank holds for weights, gradients and Adam's state, by part (Rajbhandari et al. 2020, section 5).

    float32 ZeRO keeps a master copy beside the model's own weights, sharded from stage 1 on. Activations and
    communication buffers are not included.
    """
    width = 4 if precision == "fp32" else 2
    optimizer_share = world_size if stage >= 1 else 1
    gradient_share = world_size if stage >= 2 else 1
    weight_share = world_size if stage >= 3 else 1
    has_master = stage >= 1 or precision == "bf16"
    return {
        "weights": parameters * width / weight_share,
        "gradients": parameters * width / gradient_share,
        "master": parameters * 4 / optimizer_share if has_master else 0.0,
        "adam": parameters * 8 / optimizer_share,
    }


def prepare_process(rank: Rank) -> None:
    """Sets what DeepSpeed and torch read at import; call before either is imported."""
    os.environ.update(
        RANK=str(rank.rank),
        WORLD_SIZE=str(rank.world_size),
        LOCAL_RANK=str(rank.local_rank),
        LOCAL_WORLD_SIZE=str(rank.local_world_size),
        LOCAL_SIZE=str(rank.local_world_size),
        MASTER_ADDR=rank.master_address,
        MASTER_PORT=str(rank.master_port),
        OMP_NUM_THREADS=str(rank.threads),
    )
    if rank.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"


def join_process_group(rank: Rank, timeout_s: float) -> None:
    """Joins the gang's process group: gloo on CPUs, NCCL on GPUs."""
    import deepspeed
    import deepspeed.ops
    import torch

    torch.set_num_threads(rank.threads)
    if rank.device == "cpu":
        # Otherwise the first start compiles a shared-memory collective for a minute, which training does not use;
        # a process killed during that build leaves a lock on which every later start hangs.
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
    else:
        torch.cuda.set_device(rank.local_rank)
    backend = "gloo" if rank.device == "cpu" else "nccl"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timedelta(seconds=timeout_s))
