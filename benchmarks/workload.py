"""The work that pretraining's benchmarks share with the peers, and how a peer is started on it."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PEERS = Path(__file__).with_name("peers")
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# 4.2 million parameters, two ranks.
SMALL = (
    'run.name="bench"',
    "tokenizer.vocab_size=2048",
    "model.hidden_size=256",
    "model.layers=4",
    "model.heads=4",
    "model.intermediate_size=704",
    "model.context_length=128",
    "pretrain.batch_size=16",
    "pretrain.micro_batch_size=8",
    "pretrain.learning_rate=1e-3",
    "pretrain.warmup_steps=1",
    "pretrain.zero_stage=2",
    "data.validation_fraction=0.002",
    "cluster.world_size=2",
    "cluster.threads_per_rank=1",
)
_QUIET = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Workload:
    """A prepared run and the same work for the peers.

    Args:
        folder: receives both.
        preset: the configuration that the settings change.
        settings: ``group.field=value``.
        steps: of every peer; Siloweave commits and validates after the last one only.
    """

    def __init__(self, folder: Path, preset: str, settings: Sequence[str], steps: int) -> None:
        from configs.load import load
        from configs.parse import to_toml
        from configs.run_directory import run_directory
        from trainer.data.prepare import prepare

        ends = [f"pretrain.steps={steps}", f"pretrain.validate_every={steps}", f'run.storage="{folder}"']
        if not any(setting.startswith("pretrain.commit_every") for setting in settings):
            ends.append(f"pretrain.commit_every={steps}")
        self.config = load(preset, [*settings, *ends])
        self.run_directory = run_directory(self.config)
        self.steps = steps
        self.tokens_per_step = self.config.pretrain.batch_size * self.config.model.context_length
        manifest = prepare(self.config, self.run_directory)
        self.folder = folder / "work"
        self.toml = folder / "bench.toml"
        self.toml.write_text(to_toml(self.config), encoding="utf-8")
        self._write(manifest.metadata["vocab_size"])

    def _write(self, vocab_size: int) -> None:
        from trainer.data.batches import Batches
        from trainer.data.packing import token_dtype
        from trainer.models.families import attention, model_config, parameter_sizes
        from trainer.pretraining.deepspeed_settings import deepspeed_config
        from trainer.pretraining.optimizers import learning_rate

        config, settings = self.config, self.config.pretrain
        self.folder.mkdir()
        model_config(config.model, vocab_size).save_pretrained(self.folder / "model")
        batches = Batches(config, self.run_directory / "corpus")
        steps = min(self.steps, 1000)
        windows = [batches.share(step, 0, 1).tokens for step in range(steps)]
        np.save(self.folder / "windows.npy", np.stack(windows).astype(token_dtype(vocab_size)))
        work = {
            "batch_size": settings.batch_size,
            "micro_batch_size": settings.micro_batch_size,
            "steps": self.steps,
            "seed": config.run.seed,
            "learning_rates": [learning_rate(settings, step) for step in range(steps)],
            "weight_decay": settings.weight_decay,
            "attention": attention(),
        }
        (self.folder / "work.json").write_text(json.dumps(work))
        sizes = parameter_sizes(config.model, vocab_size)
        deepspeed = deepspeed_config(settings, config.cluster.world_size, sizes)
        (self.folder / "deepspeed.json").write_text(json.dumps(deepspeed))

    def command(self, peer: str, record: Path, *more: str) -> list[str]:
        """How a peer is started; its lines go to ``record``."""
        work = [str(self.folder), str(record), *more]
        return {
            "siloweave": [sys.executable, str(PEERS / "gang.py"), str(self.toml), str(record)],
            "command": [sys.executable, "-m", "siloweave", "pretrain", "-c", str(self.toml)],
            "torchrun": [*LAUNCH, str(PEERS / "zero_loop.py"), *work],
            "hf_trainer": [*LAUNCH, str(PEERS / "hf_trainer.py"), *work],
            "ray_train": [sys.executable, str(PEERS / "ray_train.py"), *work],
        }[peer]

    def fresh(self) -> None:
        """Forgets what an earlier run of Siloweave's left beside the corpus."""
        shutil.rmtree(self.run_directory / "pretrain", ignore_errors=True)
        (self.run_directory / "events.jsonl").unlink(missing_ok=True)
        shutil.rmtree(self.folder / "ray-train", ignore_errors=True)

    def run(self, peer: str, timeout_s: float = 1800) -> tuple[float, list[dict[str, Any]]]:
        """Runs a peer to its end; how one ends that has done all its steps doesn't matter.

        Returns:
            When it was started, and its lines.
        """
        self.fresh()
        record = self.folder / f"{peer}.jsonl"
        record.unlink(missing_ok=True)
        began = time.time()
        done = subprocess.run(
            self.command(peer, record),
            env=environment(),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        path = self.run_directory / "events.jsonl" if peer == "command" else record
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        if done.returncode and (peer == "command" or self.steps not in steps_of(lines)):
            raise RuntimeError(f"{peer} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
        if done.returncode:  # gloo aborts a peer's rank at times whose neighbour has left a moment before
            print(f"{peer} did all its steps, and then ended with {done.returncode}", file=sys.stderr)
        return began, lines


def environment() -> dict[str, str]:
    """Ours, with this checkout first, one thread a rank, and no Ray but a peer's own."""
    root = str(Path(__file__).parents[1])
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    paths = [root, str(PEERS), *filter(None, [inherited.get("PYTHONPATH")])]
    return {**inherited, **_QUIET, "PYTHONPATH": os.pathsep.join(paths)}


def steps_of(lines: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The lines of the steps, by step."""
    return {line["step"]: line for line in lines if "loss" in line and line.get("event", "step") == "step"}
