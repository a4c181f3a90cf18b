"""One rank's place in the gang, and its process."""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any


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


def prepare_process(rank: Rank) -> None:
    """Sets what DeepSpeed and torch read at import; call before either is imported."""
    os.environ.update(
        RANK=str(rank.rank),
        WORLD_SIZE=str(rank.world_size),
        LOCAL_RANK=str(device_index(rank)),
        LOCAL_WORLD_SIZE=str(rank.local_world_size),
        LOCAL_SIZE=str(rank.local_world_size),
        MASTER_ADDR=rank.master_address,
        MASTER_PORT=str(rank.master_port),
        OMP_NUM_THREADS=str(rank.threads),
    )
    if rank.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"


def device_index(rank: Rank) -> int:
    """Index of this rank's GPU among those that its process sees.

    DeepSpeed takes LOCAL_RANK for that index (``DeepSpeedEngine._set_distributed_vars`` calls ``set_device`` with it).
    Ray shows an actor only the GPU that it was given, by CUDA_VISIBLE_DEVICES: that is device 0 there, whatever the
    rank's number in its node. torchrun shows every rank all GPUs of the node. Nothing else that runs here reads
    LOCAL_RANK as "first of its node".
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    alone = visible is not None and len([name for name in visible.split(",") if name.strip()]) == 1
    return 0 if alone else rank.local_rank


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
        torch.cuda.set_device(device_index(rank))
    backend, timeout = "gloo" if rank.device == "cpu" else "nccl", timedelta(seconds=timeout_s)
    if rank.device == "cpu" and rank.master_address == "127.0.0.1":
        _join_on_this_machine(rank, timeout)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout)


def _join_on_this_machine(rank: Rank, timeout: timedelta) -> None:
    """Makes the group that DeepSpeed would make, at ports that no other machine reaches.

    Torch's store would listen on all addresses of the machine, and gloo at that of its host name.
    """
    import torch

    distributed: Any = torch.distributed
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    place, first = (rank.master_address, rank.master_port), rank.rank == 0
    listening = socket.create_server(place).detach() if first else None
    store = distributed.TCPStore(*place, rank.world_size, first, timeout, master_listen_fd=listening)
    distributed.init_process_group("gloo", store=store, rank=rank.rank, world_size=rank.world_size, timeout=timeout)
