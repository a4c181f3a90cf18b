"""What every peer trains, read from one folder: the same weights, windows, optimizer and DeepSpeed settings for each.

The scripts of this folder use torch, DeepSpeed, transformers and Ray as their documentation shows it, and nothing of
Siloweave's. They are started by the benchmarks beside them; ``write_work`` in ``workload.py`` writes the folder.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np


class Work:
    """The folder: ``work.json``, ``deepspeed.json``, ``model/config.json`` and ``windows.npy``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        settings = json.loads((folder / "work.json").read_text())
        self.batch_size: int = settings["batch_size"]
        self.micro_batch_size: int = settings["micro_batch_size"]
        self.steps: int = settings["steps"]
        self.seed: int = settings["seed"]
        self.learning_rates: list[float] = settings["learning_rates"]
        self.weight_decay: float = settings["weight_decay"]
        self.attention: str = settings["attention"]
        self.deepspeed: dict[str, Any] = json.loads((folder / "deepspeed.json").read_text())
        # Of each step the global batch: (steps, batch_size, context_length).
        self.windows = np.load(folder / "windows.npy", mmap_mode="r")

    def share(self, step: int, rank: int, world_size: int) -> Any:
        """A rank's windows of a step, as a tensor (sequences, context_length)."""
        import torch

        return torch.from_numpy(self.windows[step % len(self.windows), rank::world_size].astype(np.int64))

    def new_model(self) -> Any:
        """The model at the start that the seed gives."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(self.seed)
        return AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(self.folder / "model"), dtype=torch.float32, attn_implementation=self.attention
        )

    def new_optimizer(self, model: Any) -> Any:
        """AdamW; weight decay on matrices, none on norms."""
        import torch

        matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
        vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.learning_rates[0], betas=(0.9, 0.95))


class Record:
    """When a peer came how far, and every step's loss: lines of JSON, by wall clock; of rank 0 alone."""

    def __init__(self, path: Path, rank: int = 0) -> None:
        self._file = (path if rank == 0 else Path(os.devnull)).open("a", buffering=1)

    def mark(self, name: str) -> None:
        self._write(mark=name)

    def step(self, step: int, loss: float) -> None:
        self._write(step=step, loss=loss)

    def worker(self) -> None:
        self._write(worker=os.getpid())

    def _write(self, **values: Any) -> None:
        self._file.write(json.dumps({"time": time.time(), **values}) + "\n")


def skip_compilation() -> None:
    """DeepSpeed's first start on CPUs would compile a collective for a minute, which none of the peers uses."""
    import deepspeed.ops

    deepspeed.ops.__dict__["__compatible_ops__"] = {}
