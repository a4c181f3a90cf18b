"""Bytes of weights, gradients and optimizer on a rank, read from DeepSpeed's own tensors, beside what the formula says.

python benchmarks/memory.py --json memory.json
"""

import argparse
import gc
import json
import logging
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from figures import setting

from configs.load import load
from configs.schema.schema import RunConfig
from trainer.pretraining.memory import state_bytes
from trainer.rank import Rank, join_process_group, prepare_process

VOCABULARY, CONTEXT, MICRO_BATCH, BATCH = 4096, 8, 1, 4
MODEL = (
    "model.hidden_size=256",
    "model.intermediate_size=704",
    "model.layers=4",
    "model.heads=4",
    f"model.context_length={CONTEXT}",
    f"pretrain.batch_size={BATCH}",
    f"pretrain.micro_batch_size={MICRO_BATCH}",
)


class Walk:
    """What a case's tensors hold at the moments of a step; batch and activations are too small here to matter."""

    def __init__(self) -> None:
        gc.collect()
        gc.freeze()  # what is there before the engine is not looked at
        self.bytes: dict[str, int] = {}

    def __call__(self, moment: str) -> None:
        import torch

        tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
        grads = [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
        storages = [tensor.untyped_storage() for tensor in (*tensors, *grads)]
        size = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        self.bytes[moment] = max(size, self.bytes.get(moment, 0))


def measure(config: RunConfig, rank: Rank) -> dict[str, Any]:
    """Trains two steps, and walks the tensors in the second."""
    import torch

    from trainer.objectives.causal import next_token_nats
    from trainer.pretraining.engine import build_engine

    walk = Walk()
    engine = build_engine(config, rank, VOCABULARY)
    sizes = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters()]
    inner = engine.optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    watching: list[Any] = []
    for step in range(2):
        if step == 1:  # the moments inside: nearly all gradients are there; torch's optimizer is about to step
            embedding = engine.module.get_input_embeddings()
            watching.append(embedding.register_full_backward_pre_hook(lambda *_: walk("backward")))
            watching.append(inner.register_step_pre_hook(lambda *_: walk("step")))
        for _ in range(engine.gradient_accumulation_steps()):
            tokens = torch.randint(VOCABULARY, (MICRO_BATCH, CONTEXT), generator=torch.Generator().manual_seed(step))
            engine.backward(next_token_nats(engine, tokens))
            if step == 1:
                walk("boundary")
            engine.step()
    walk("after")
    for hook in watching:
        hook.remove()
    parts = state_bytes(config.pretrain, sizes, config.pretrain.zero_stage, rank.world_size)
    values = sum(sizes)
    del inner
    engine.destroy()
    return {
        "parameters": values,
        "measured": walk.bytes,
        "measured_peak": max(walk.bytes.values()),
        "formula": parts,
        "formula_peak": sum(parts.values()),
    }


def cases(world_size: int) -> Iterator[dict[str, Any]]:
    """Every stage, precision and number of moments, and offload where there is one."""
    for stage, precision, optimizer in product(range(4), ("fp32", "bf16"), ("adamw", "momentum", "sgd")):
        yield {"world_size": world_size, "zero_stage": stage, "precision": precision, "optimizer": optimizer}
    for stage in (1, 2, 3):
        yield {
            "world_size": world_size,
            "zero_stage": stage,
            "precision": "bf16",
            "optimizer": "adamw",
            "offload_optimizer": "cpu",
            "offload_parameters": "cpu" if stage == 3 else "none",
        }


def settings_of(case: dict[str, Any]) -> RunConfig:
    """The run's settings of a case."""
    own = [f"pretrain.{name}={value}" for name, value in case.items() if name != "world_size"]
    return load("tiny", [*MODEL, f"cluster.world_size={case['world_size']}", *own])


def work(rank: Rank, wanted: list[dict[str, Any]]) -> None:
    """One rank's process."""
    warnings.simplefilter("ignore")
    prepare_process(rank)
    join_process_group(rank, 300)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    for case in wanted:
        found = measure(settings_of(case), rank)
        if rank.rank == 0:
            print(json.dumps({**case, **found}), flush=True)


def run(world_size: int, wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cases on so many ranks, one process each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--work", json.dumps([rank, world_size, port, wanted])],
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(world_size)
    ]
    output, _ = processes[0].communicate()
    if any(process.wait() for process in processes):
        raise RuntimeError("a rank failed")
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        rank, world_size, port, wanted = arguments.work
        work(Rank(rank, world_size, rank, world_size, "127.0.0.1", port, "cpu", 1), wanted)
        return
    found = [row for world_size in (1, 2) for row in run(world_size, list(cases(world_size)))]
    for row in found:
        moments = " ".join(f"{name} {size / row['parameters']:.3f}" for name, size in row["measured"].items())
        print(
            f"{row['world_size']} rank(s) stage {row['zero_stage']} {row['precision']} {row['optimizer']:<8} "
            f"{'offload' if 'offload_optimizer' in row else ''} bytes a parameter: {moments}; "
            f"formula {row['formula_peak'] / row['parameters']:.3f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({**setting(("torch", "deepspeed")), "cases": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
