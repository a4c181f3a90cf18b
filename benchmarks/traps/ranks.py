"""Opacus' distributed optimizer in real processes over gloo."""

import contextlib
import datetime
import os
import socket
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

TIMEOUT_S = 8
SIGMA = 1000.0  # so that the clipped sum under the noise does not show


def noise(world_size: int) -> float:
    """Standard deviation of the noise on the sum over all ranks, in units of sigma * C."""
    lost = _spawn(_noise_of, world_size)
    if not all(torch.equal(one, lost[0]) for one in lost):
        raise RuntimeError("the ranks hold different weights")
    return float(lost[0].std())


def epochs(world_size: int) -> tuple[list[int], str]:
    """Steps that each rank took in four epochs over 12 records at rate 1/6, and what went wrong."""
    found = _spawn(_epochs_of, world_size)
    problems = [problem for _, problem in found if problem]
    return [steps for steps, _ in found], problems[0] if problems else ""


def _spawn(work: Any, world_size: int) -> list[Any]:
    from torch import multiprocessing

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (work, world_size, port, folder), nprocs=world_size)
        return [torch.load(Path(folder) / str(rank), weights_only=True) for rank in range(world_size)]


def _rank(rank: int, work: Any, world_size: int, port: int, folder: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timeout)
    torch.save(work(rank), Path(folder) / str(rank))
    with contextlib.suppress(RuntimeError):  # the other rank may be gone
        torch.distributed.destroy_process_group()


def _private(model: torch.nn.Module, num_records: int, batch_size: int, sigma: float) -> Any:
    from opacus.distributed import DifferentiallyPrivateDistributedDataParallel

    from traps.opacus_run import Run

    return Run(
        DifferentiallyPrivateDistributedDataParallel(model),
        num_records=num_records,
        batch_size=batch_size,
        noise_multiplier=sigma,
    )


def _noise_of(_: int) -> torch.Tensor:
    from traps.engine import wide
    from traps.opacus_run import MAX_GRAD_NORM

    run = _private(wide(), 640, 64, SIGMA)
    x_B, _ = next(iter(run.loader))
    return run.step(x_B) * 64 / (SIGMA * MAX_GRAD_NORM)


def _epochs_of(rank: int) -> tuple[int, str]:
    from traps.engine import Averaged

    torch.manual_seed(rank)
    run = _private(Averaged(torch.nn.Embedding(10, 4)), 12, 2, 1.0)
    steps = 0
    try:
        for _ in range(4):
            for x_B, _ in run.loader:
                run.step(x_B)
                steps += 1
        torch.distributed.barrier()
    except RuntimeError as error:
        lost = "timed out" in str(error).lower() or "closed" in str(error).lower()
        return steps, "a rank waited in vain for the other" if lost else str(error).splitlines()[0]
    return steps, ""
