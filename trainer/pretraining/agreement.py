"""What the ranks agree on about their common storage before they train."""

import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from configs.errors import InputError, SiloweaveError
from configs.schema.schema import RunConfig
from configs.storage.storage import Storage
from trainer.rank import Rank

Made = TypeVar("Made")


def prove_shared(storage: Storage, rank: Rank) -> str:
    """Every rank must read what rank 0 wrote: checkpoints in a storage that is not shared would be lost.

    Returns:
        A name of this start of the gang: all its ranks know it, and no other start has it.

    Raises:
        InputError: this rank does not see rank 0's file.
        SiloweaveError: the storage does not answer.
    """
    from torch import distributed

    folder = f"probe-{rank.master_port}"
    if rank.rank == 0:
        storage.write(f"{folder}/attempt", uuid.uuid4().hex.encode())
    distributed.barrier()
    seen = storage.read(f"{folder}/attempt") if "attempt" in storage.names(folder) else None
    distributed.barrier()
    if rank.rank == 0:
        storage.remove(folder)
    if not seen:
        raise InputError(
            f"{storage}: rank {rank.rank} does not see rank 0's file; give a run.storage that all nodes share"
        )
    return seen.decode()


def first_on_its_node(rank: Rank, config: RunConfig, work: Callable[[], Made]) -> Made:
    """What fetches from a store is done by one rank of each node first; the others find it there."""
    from torch import distributed

    if config.run.url is None:
        return work()
    if rank.local_rank:
        distributed.barrier()
        return work()
    made = work()
    distributed.barrier()
    return made


def require_same_step(step: int, storage: Storage, device: Any) -> None:
    """Ranks that go on from different commits would train something that nobody can name.

    Raises:
        SiloweaveError: the ranks don't agree.
    """
    import torch
    from torch import distributed

    lowest = torch.tensor([step], device=device)
    highest = lowest.clone()
    distributed.all_reduce(lowest, distributed.ReduceOp.MIN)
    distributed.all_reduce(highest, distributed.ReduceOp.MAX)
    if lowest.item() != highest.item():
        raise SiloweaveError(
            f"{storage}: ranks found different newest commits, of step {lowest.item()} and {highest.item()}; see "
            "whether all nodes read the storage alike, then run the same command again"
        )
