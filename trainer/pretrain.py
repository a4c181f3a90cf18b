"""The pretraining loop of one rank: DeepSpeed engine, exact data, committed checkpoints."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.artifacts import digest_json, require_manifest
from configs.encryption import load_key
from configs.errors import InputError
from configs.schema import RunConfig
from trainer import checkpoints
from trainer.data.packing import Cursor, TokenFile
from trainer.data.prepare import TRAIN_TOKENS
from trainer.objective import next_token_nats, validate
from trainer.optimizers import learning_rate, new_optimizer
from trainer.startup import Start, import_libraries
from trainer.zero import Rank, accumulation_steps, deepspeed_config, join_process_group

Report = Callable[[dict[str, Any]], None]
Enter = Callable[[int, str], None]


def pretrain_digest(config: RunConfig, corpus_digest: str) -> str:
    """Digest of everything that shapes the weights; checkpoints of another one are not continued."""
    return digest_json(
        [
            config.model.model_dump(),
            config.pretrain.model_dump(),
            config.cluster.world_size,
            config.run.seed,
            corpus_digest,
        ]
    )


def warm_up(config: RunConfig) -> None:
    """Does ahead what a start does before it knows its peers: imports, and the first use of what imports lazily."""
    import_libraries()
    import torch

    from trainer.models import new_model

    torch.set_num_threads(config.cluster.threads_per_rank)
    small = config.model.model_copy(update={"hidden_size": 2 * config.model.heads, "intermediate_size": 8, "layers": 1})
    model = new_model(small, vocab_size=16, seed=0)
    next_token_nats(model, torch.zeros(1, 8, dtype=torch.int64)).backward()
    torch.optim.AdamW(model.parameters()).step()


def pretrain(config: RunConfig, run_directory: Path, rank: Rank, report: Report, enter: Enter) -> None:
    """Trains to the last step, from the newest committed checkpoint where there is one.

    Args:
        config: the run's settings.
        run_directory: holds ``corpus/``; receives ``pretrain/checkpoints/``.
        rank: this process's place in the gang; its environment is already prepared.
        report: receives one dict an event (rank 0 only).
        enter: called with step and name at the start of every phase, on every rank alike.

    Raises:
        FloatingPointError: the loss, the gradient or a weight is not finite; such a step is never committed.
        InputError: there is no encryption key on this node, or a checkpoint was not written with it.
        SiloweaveError: a checkpoint could not be written.
    """
    begin = Start(enter)
    begin.imports()
    import torch
    from torch import distributed

    settings, corpus = config.pretrain, run_directory / "corpus"
    manifest = require_manifest(corpus, "corpus", "prepare")
    digest = pretrain_digest(config, manifest.content_digest)
    root = run_directory / "pretrain" / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    report = report if rank.rank == 0 else _ignore
    key = load_key(config.run.encryption_key_file)
    engine = _join_and_build(config, rank, root, manifest.metadata["vocab_size"], begin)
    if key is not None:
        checkpoints.keep_sealed(engine, key)
    begin.phase("resume")
    start = _resume(engine, root, digest, report)
    report({"event": "started", "seconds": begin.seconds()})
    train = TokenFile(corpus / TRAIN_TOKENS, config.model.context_length)
    cursor = Cursor(train.num_windows, settings.batch_size, config.run.seed)
    targets_per_step = settings.batch_size * (config.model.context_length - 1)
    # DeepSpeed averages over ranks and micro-batches; the loss is the global sum over the global number of targets.
    scale = rank.world_size * accumulation_steps(settings, rank.world_size) / targets_per_step

    for step in range(start, settings.steps):
        began, done = time.perf_counter(), step + 1
        enter(done, "data")
        # 1. The rank's share of the global batch, a pure function of (seed, step, position).
        windows = train.windows(cursor.rank_windows(step, rank.rank, rank.world_size))
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        # 2. Forward and backward, micro-batch by micro-batch; the optimizer steps after the last.
        nats = torch.zeros((), device=engine.device)
        for micro in torch.from_numpy(windows).split(settings.micro_batch_size):
            enter(done, "forward")
            micro_nats = next_token_nats(engine, micro.to(engine.device))
            enter(done, "backward")
            engine.backward(micro_nats * scale)
            enter(done, "step")
            engine.step()
            nats += micro_nats.detach()
        # 3. The global loss, for people.
        enter(done, "loss")
        loss = _global_loss(engine, nats, done) / targets_per_step
        report(_step_event(config, done, loss, time.perf_counter() - began))
        # 4. Validation and commit.
        if done % settings.validate_every == 0 or done == settings.steps:
            enter(done, "validation")
            report({"event": "validation", "step": done, **validate(engine, config, corpus, manifest.metadata, rank)})
        if done % settings.commit_every == 0 or done == settings.steps:
            enter(done, "commit")
            _require_finite(engine, done)
            checkpoints.save(engine, root, done, digest, distributed.barrier, rank.rank)
            if rank.rank == 0:
                checkpoints.prune(root, settings.keep_commits)
            report({"event": "commit", "step": done})
    distributed.barrier()
    distributed.destroy_process_group()


def _join_and_build(config: RunConfig, rank: Rank, root: Path, vocab_size: int, begin: Start) -> Any:
    begin.phase("join")
    # The driver notices a hang first; this is for a rank that has no driver any more.
    join_process_group(rank, 2 * config.cluster.hang_timeout_s)
    _prove_shared(root, rank)
    begin.phase("build")
    return build_engine(config, rank, vocab_size)


def _global_loss(engine: Any, nats: Any, step: int) -> float:
    """Sum over all ranks of a step that was good: every rank raises where one was not."""
    from torch import distributed

    if engine.skipped_steps:  # DeepSpeed's answer to a gradient that is not finite: training would stand still
        raise FloatingPointError(f"the gradient of step {step} is not finite; lower pretrain.learning_rate")
    distributed.all_reduce(nats)
    if not math.isfinite(nats.item()):
        raise FloatingPointError(f"the loss of step {step} is {nats.item()}; lower pretrain.learning_rate")
    return float(nats.item())


def _step_event(config: RunConfig, done: int, loss: float, seconds: float) -> dict[str, Any]:
    return {
        "event": "step",
        "step": done,
        "steps": config.pretrain.steps,
        "loss": loss,
        "learning_rate": learning_rate(config.pretrain, done - 1),
        "tokens": config.pretrain.batch_size * config.model.context_length,
        "seconds": seconds,
    }


def _prove_shared(root: Path, rank: Rank) -> None:
    """Every rank must see rank 0's file: a storage folder that is not shared would lose its checkpoints."""
    from torch import distributed

    probe = root / f"probe-{rank.master_port}"
    if rank.rank == 0:
        probe.touch()
    distributed.barrier()
    seen = probe.exists()
    distributed.barrier()
    if rank.rank == 0:
        probe.unlink()
    if not seen:
        raise InputError(
            f"{root}: rank {rank.rank} does not see rank 0's file; give a run.storage that all nodes share"
        )


def _require_finite(engine: Any, step: int) -> None:
    """A gradient that was not finite shows in the next step's loss only: too late for a commit in between."""
    import torch
    from torch import distributed

    finite = torch.stack([parameter.detach().isfinite().all() for parameter in engine.module.parameters()]).all()
    broken = (~finite).float()
    distributed.all_reduce(broken)
    if broken.item():
        raise FloatingPointError(f"the weights after step {step} are not finite; lower pretrain.learning_rate")


def _ignore(_: dict[str, Any]) -> None:
    """Only rank 0 reports."""


def build_engine(config: RunConfig, rank: Rank, vocab_size: int) -> Any:
    """The DeepSpeed engine around a model at its random start and its optimizer."""
    import deepspeed

    from trainer.models import new_model

    model = new_model(config.model, vocab_size, config.run.seed).train()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=new_optimizer(config.pretrain, model),
        config=deepspeed_config(config.pretrain, rank.world_size),
    )
    return engine


def _resume(engine: Any, root: Path, digest: str, report: Report) -> int:
    found = checkpoints.newest(root, digest, lambda line: report({"event": "damaged", "message": line}))
    if found is None:
        return 0
    # Pickles: loaded only from the run's own storage, after their digests held.
    engine.load_checkpoint(str(root), tag=found.directory.name)
    report({"event": "resume", "step": found.step})
    return found.step
