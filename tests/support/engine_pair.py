"""One rank of a pair that trains one combination of settings after the other; rank 0 prints a JSON line for each.

python engine_pair.py RANK WORLD_SIZE PORT CASES_FILE
"""

import gc
import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path

from repository import REPOSITORY

from configs.load import load
from trainer.rank import Rank, join_process_group, prepare_process

VOCABULARY, STEPS, SAVED = 64, 4, 2
TINY = (
    "model.hidden_size=16",
    "model.intermediate_size=32",
    "model.context_length=16",
    "pretrain.steps=40",
    "pretrain.batch_size=8",
    "pretrain.micro_batch_size=2",
    "pretrain.max_grad_norm=0.5",
)


def settings(overrides, world_size):
    return load("tiny", [*TINY, f"cluster.world_size={world_size}", *overrides])


def batch(config, step):
    """The step's sequences, the same for everyone."""
    import torch

    generator = torch.Generator().manual_seed(step)
    shape = (config.pretrain.batch_size, config.stage_at(step).context_length)
    return torch.randint(VOCABULARY, shape, generator=generator)


def train(engine, config, rank, first, last, scale_by=1.0):
    """The loop of trainer/pretraining/loop.py without its data. Returns the global loss of every step."""
    import torch
    from torch import distributed

    from trainer.objectives.causal import next_token_nats
    from trainer.pretraining.deepspeed_settings import accumulation_steps
    from trainer.pretraining.engine import set_step

    chosen, found = config.pretrain, []
    for step in range(first, last):
        targets = chosen.batch_size * (config.stage_at(step).context_length - 1)
        scale = rank.world_size * accumulation_steps(chosen, rank.world_size) / targets
        set_step(engine, config, step, rank)
        nats = torch.zeros(())
        for micro in batch(config, step)[rank.rank :: rank.world_size].split(chosen.micro_batch_size):
            loss = next_token_nats(engine, micro)
            engine.backward(loss * scale * scale_by)
            engine.step()
            nats += loss.detach()
        distributed.all_reduce(nats)
        found.append(nats.item() / targets)
    return found


def notices_nan(engine, config, rank):
    """Whether a gradient that is not finite is noticed before anything could be committed."""
    from trainer.pretraining.engine import gradient_trouble, weight_trouble

    train(engine, config, rank, STEPS, STEPS + 1, scale_by=float("nan"))
    troubles = [gradient_trouble(engine), weight_trouble(engine)]  # the second is a collective
    return any(troubles)


def study(config, rank, folder):
    """Trains, and trains the last steps again from a checkpoint."""
    import torch

    from trainer.pretraining.engine import build_engine

    torch.manual_seed(rank.rank)  # nothing may depend on it
    engine = build_engine(config, rank, VOCABULARY)
    losses = train(engine, config, rank, 0, SAVED)
    engine.save_checkpoint(folder, tag="saved", save_latest=False)
    losses += train(engine, config, rank, SAVED, STEPS)
    noticed = notices_nan(engine, config, rank)
    engine.destroy()
    del engine
    gc.collect()
    engine = build_engine(config, rank, VOCABULARY)
    engine.load_checkpoint(folder, tag="saved")
    resumed = train(engine, config, rank, SAVED, STEPS)
    engine.destroy()
    return {"losses": losses, "resumed": resumed, "nan_noticed": noticed}


def train_only(config, rank, _):
    from trainer.pretraining.engine import build_engine

    engine = build_engine(config, rank, VOCABULARY)
    losses = train(engine, config, rank, 0, STEPS)
    from torch._dynamo.utils import counters

    return {"losses": losses, "compiled": counters["stats"]["unique_graphs"]}


def walk(overrides, rank):
    """Memory: see benchmarks/memory.py."""
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    import memory

    return memory.measure(load("tiny", [*memory.MODEL, f"cluster.world_size={rank.world_size}", *overrides]), rank)


def main():
    number, world_size, port = map(int, sys.argv[1:4])
    rank = Rank(number, world_size, number, world_size, "127.0.0.1", port, "cpu", 1)
    warnings.simplefilter("ignore")
    prepare_process(rank)
    join_process_group(rank, 600)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    from torch import distributed

    for kind, overrides in json.loads(Path(sys.argv[4]).read_text()):
        folders = [tempfile.mkdtemp() if number == 0 else None]
        distributed.broadcast_object_list(folders)
        if kind == "memory":
            found = walk(overrides, rank)
        else:
            work = study if kind == "study" else train_only
            found = work(settings(overrides, world_size), rank, folders[0])
        if number == 0:
            sys.stdout.write(json.dumps({"kind": kind, "overrides": overrides, **found}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
