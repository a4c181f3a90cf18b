"""The plain loop: DeepSpeed ZeRO on the ranks that a launcher started. Under torchrun:

torchrun --standalone --nproc-per-node 2 benchmarks/peers/zero_loop.py WORK RECORD
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from work import Record, Work, skip_compilation


def train(
    work: Work,
    record: Record,
    *,
    before: Callable[[Any], int] | None = None,
    after: Callable[[Any, int, float], None] | None = None,
) -> None:
    """Trains this rank's share.

    Args:
        work: what to train.
        record: takes the times and losses.
        before: called with the engine; gives the step to begin at.
        after: called with the engine, the steps done and the loss, after every step.
    """
    import deepspeed
    import torch
    import transformers  # noqa: F401
    from torch import distributed
    from torch.nn import functional

    torch.set_num_threads(1)
    record.mark("imported")
    skip_compilation()
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    record.mark("joined")
    model = work.new_model().train()
    engine, *_ = deepspeed.initialize(model=model, optimizer=work.new_optimizer(model), config=work.deepspeed)
    start = before(engine) if before is not None else 0
    record.mark("built")
    for step in range(start, work.steps):
        for group in engine.optimizer.param_groups:
            group["lr"] = work.learning_rates[step % len(work.learning_rates)]
        total = torch.zeros(())
        micros = work.share(step, rank, world_size).split(work.micro_batch_size)
        for tokens in micros:
            logits = engine(input_ids=tokens).logits.float()
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        distributed.all_reduce(total)
        mean = total.item() / (len(micros) * world_size)
        record.step(step + 1, mean)
        if after is not None:
            after(engine, step + 1, mean)


def main() -> None:
    record = Record(Path(sys.argv[2]), int(os.environ["RANK"]))
    record.mark("started")
    train(Work(Path(sys.argv[1])), record)
    from torch import distributed

    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
