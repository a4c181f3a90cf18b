"""The pretraining loop of one rank: DeepSpeed engine, exact data, committed checkpoints."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from configs.events import Listener
from configs.schema.pretrain import ModelSettings
from configs.schema.schema import RunConfig
from configs.schema.stages import numbered
from configs.storage.layout import RunFiles
from configs.storage.manifests import require_manifest
from configs.storage.mirror import local_stage
from configs.storage.sealing import load_key
from configs.storage.storage import Storage
from trainer.checkpoints import checkpoints, resize
from trainer.checkpoints.checkpoints import pretrain_digest
from trainer.checkpoints.committer import Committer
from trainer.checkpoints.scratch import scratch_folder
from trainer.data.batches import Batches, prove_disjoint
from trainer.data.order import SkippedData
from trainer.objectives.causal import next_token_nats
from trainer.objectives.objective import Objective, new_objective
from trainer.objectives.pieces import Examples
from trainer.pretraining.agreement import first_on_its_node, prove_shared, require_same_step
from trainer.pretraining.deepspeed_settings import accumulation_steps
from trainer.pretraining.engine import build_engine, gradient_trouble, onednn_computes, set_step, weight_trouble
from trainer.pretraining.optimizers import learning_rate, new_optimizer
from trainer.pretraining.rollback import Progress
from trainer.pretraining.startup import Start, import_libraries
from trainer.pretraining.throughput import Throughput
from trainer.pretraining.validation import to_tensors, validate
from trainer.rank import Rank, join_process_group

Enter = Callable[[int, str], None]
Alive = Callable[[], None]
_ORPHANED_S = 24 * 3600  # longer than ranks whose own parts are copied wait for the slowest rank's part


def warm_up(config: RunConfig) -> None:
    """Does ahead what a start does before it knows its peers: imports, and the first use of what imports lazily."""
    import_libraries()
    import torch

    from trainer.models.families import empty_model, new_model

    torch.set_num_threads(config.cluster.threads_per_rank)
    empty_model(config.model, 16, config.objective)
    small = ModelSettings(hidden_size=2, heads=1, intermediate_size=8, layers=1)
    model = new_model(small, vocab_size=16, seed=0)
    next_token_nats(model, torch.zeros(1, 8, dtype=torch.int64)).backward()
    new_optimizer(config.pretrain, model).step()


def pretrain(
    config: RunConfig,
    run_directory: Path,
    rank: Rank,
    report: Listener,
    enter: Enter,
    alive: Alive,
    skipped: SkippedData = (),
) -> None:
    """Trains to the last step, from the newest committed checkpoint where there is one.

    Args:
        config: the run's settings.
        run_directory: holds ``corpus/``; receives ``pretrain/checkpoints/``.
        rank: this process's place in the gang; its environment is already prepared.
        report: receives one dict per event (rank 0 only).
        enter: called with step and name at the start of every phase, on every rank alike.
        alive: called within a phase while the rank waits for something that moves.
        skipped: ranges of batches to pass over, besides those that the checkpoint knows.

    Raises:
        RollBack: the loss is a spike, or the loss, the gradient or a weight is not finite; it is not committed.
        InputError: there is no encryption key on this node, or a checkpoint was not written with it.
        SiloweaveError: a checkpoint could not be written, the storage does not answer, or too many rollbacks.
    """
    settings = config.pretrain
    report = report if rank.rank == 0 else _ignore
    begun = _begin(config, run_directory, rank, report, enter, skipped)
    engine, corpus, facts, progress, commits, batches, objective = begun
    rates = Throughput(engine.module, config, rank)
    stage_number = partial(numbered, [stage.steps for stage in settings.stages])
    import torch
    from torch import distributed

    for step in range(progress.committed, settings.steps):
        began, done, stage = time.perf_counter(), step + 1, config.stage_at(step)
        enter(done, "data")
        if step == stage.first:
            progress.forget_losses()
        # 1. The rank's share of the global batch, a pure function of (seed, step, place).
        share = batches.share(step, rank.rank, rank.world_size)
        micro_batches = [objective.examples(part) for part in share.windows.micro_batches(settings.micro_batch_size)]
        targets = _targets(micro_batches, engine)
        # DeepSpeed averages over ranks and micro-batches; the loss is the global sum over the global number of targets.
        scales = (rank.world_size * accumulation_steps(settings, rank.world_size) / targets).float()
        set_step(engine, config, step, rank)
        # 2. Forward and backward, micro-batch by micro-batch; the optimizer steps after the last.
        sums = torch.zeros(objective.terms, device=engine.device)
        for examples in micro_batches:
            enter(done, "forward")
            micro_sums = objective.sums(engine, to_tensors(examples.inputs, engine))
            enter(done, "backward")
            engine.backward((micro_sums * scales).sum())
            enter(done, "step")
            engine.step()
            sums += micro_sums.detach()
        # 3. The global loss, for people, and for the decision whether to go on from here.
        enter(done, "loss")
        since_commit = batches.number(progress.committed), batches.number(step) + 1
        progress.require(gradient_trouble(engine), done, since_commit)
        distributed.all_reduce(sums)
        loss = (sums / targets).sum().item()
        progress.require_good_loss(loss, done, since_commit)
        report(_step_event(config, done, loss, time.perf_counter() - began, rates))
        # 4. Validation and commit.
        if done % settings.validate_every == 0 or done == settings.steps:
            enter(done, "validation")
            report({"event": "validation", "step": done, **validate(engine, objective, config, corpus, facts, rank)})
        if done % settings.commit_every == 0 or done == settings.steps:
            enter(done, "commit")
            progress.require(weight_trouble(engine), done, since_commit)
            asked = time.perf_counter()
            _finish(commits, partial(enter, done), alive)
            enter(done, "save")
            commits.commit(engine, done, {**progress.as_metadata(), **stage_number(step)}, asked)
            progress.committed = done
        commits.check()
    _leave(commits, partial(enter, settings.steps), alive)


class _Begun(NamedTuple):
    engine: Any
    corpus: Path
    facts: dict[str, Any]
    progress: Progress
    commits: Committer
    batches: Batches
    objective: Objective


def _begin(
    config: RunConfig, run_directory: Path, rank: Rank, report: Listener, enter: Enter, skipped: SkippedData
) -> _Begun:
    """Joins the gang, builds the engine, and continues from the newest commit."""
    begin = Start(enter)
    begin.imports()
    begin.phase("join")
    # The driver notices a hang; this timeout is for a rank that has no driver any more.
    join_process_group(rank, max(_ORPHANED_S, 2 * config.cluster.hang_timeout_s))
    storage = checkpoints.storage(config, run_directory)
    attempt = prove_shared(storage, rank)
    begin.phase("corpus")
    corpus = first_on_its_node(rank, config, lambda: local_stage(config, RunFiles(run_directory).corpus))
    manifest = require_manifest(corpus, "corpus", "prepare")
    digest = pretrain_digest(config, manifest.content_digest)
    begin.phase("build")
    engine = build_engine(config, rank, manifest.metadata["vocab_size"])
    tokenizer = first_on_its_node(rank, config, lambda: local_stage(config, RunFiles(run_directory).tokenizer))
    objective = new_objective(config, tokenizer)
    key = load_key(config.run.encryption_key_file)
    if key is not None:
        checkpoints.keep_sealed(engine, key, digest)
    begin.phase("resume")
    progress = Progress(config.pretrain, _resume(engine, config, storage, digest, rank, report), skipped)
    scratch = scratch_folder(config, run_directory)
    commits = Committer(config, storage, scratch, rank, attempt, progress.committed, digest, report)
    batches = Batches(config, corpus, progress.skipped)
    _prove_shares(batches, progress.committed, rank)
    report({"event": "started", "seconds": begin.seconds(), "onednn": onednn_computes(config, rank)})
    return _Begun(engine, corpus, manifest.metadata, progress, commits, batches, objective)


def _targets(micro_batches: list[Examples], engine: Any) -> Any:
    """Number of targets of each of the loss' terms, over all ranks, shape (terms,)."""
    import torch
    from torch import distributed

    counts = torch.tensor([examples.counts for examples in micro_batches], device=engine.device).sum(dim=0)
    distributed.all_reduce(counts)
    return counts.clamp(min=1).double()


def _prove_shares(batches: Batches, step: int, rank: Rank) -> None:
    """All ranks compare the samples that they are about to train on in their first step."""
    from torch import distributed

    mine = batches.share(step, rank.rank, rank.world_size).digests()
    shares: list[dict[int, str]] = [{} for _ in range(rank.world_size)]
    distributed.all_gather_object(shares, mine)
    prove_disjoint(shares, batches.share(step, 0, 1).digests())


def _step_event(config: RunConfig, done: int, loss: float, seconds: float, rates: Throughput) -> dict[str, Any]:
    length = config.stage_at(done - 1).context_length
    tokens = config.pretrain.batch_size * length
    return {
        "event": "step",
        "step": done,
        "steps": config.pretrain.steps,
        **numbered([stage.steps for stage in config.pretrain.stages], done - 1),
        "loss": loss,
        "learning_rate": learning_rate(config.pretrain, done - 1),
        "tokens": tokens,
        "seconds": seconds,
        **rates.figures(tokens, length, seconds),
    }


def _finish(commits: Committer, enter: Callable[[str], None], alive: Alive) -> None:
    """Waits for the commit under way: for this rank's part; a phase later, for the others'; then for all of it."""
    from torch import distributed

    commits.await_part(alive)
    enter("gather")
    distributed.barrier()
    commits.finish()


def _leave(commits: Committer, enter: Callable[[str], None], alive: Alive) -> None:
    """Nobody leaves before the last commit stands: rank 0 is the last to know."""
    from torch import distributed

    enter("last commit")
    _finish(commits, enter, alive)
    commits.close()
    enter("leave")
    distributed.barrier()
    distributed.destroy_process_group()


def _ignore(_: dict[str, Any]) -> None:
    """Only rank 0 reports."""


def _resume(
    engine: Any, config: RunConfig, storage: Storage, digest: str, rank: Rank, report: Listener
) -> dict[str, Any]:
    """Loads the newest commit, if there is one. Returns its metadata."""

    def tell(line: str) -> None:
        report({"event": "damaged", "message": line})

    found = first_on_its_node(rank, config, lambda: checkpoints.newest(storage, digest, tell))
    require_same_step(found.step if found else 0, storage, engine.device)
    if found is None:
        return {}
    saved, now = found.manifest.metadata.get("world_size", engine.world_size), engine.world_size
    # Pickles: loaded only from the run's own storage, after their digests held.
    if saved == now or not engine.zero_optimization():
        engine.load_checkpoint(str(found.directory.parent), tag=found.directory.name)
    else:
        began, key = time.perf_counter(), load_key(config.run.encryption_key_file)
        resize.load_resized(engine, found.directory, saved, partial(checkpoints.read_shard, engine, key))
        seconds = round(time.perf_counter() - began, 3)
        report({"event": "convert", "step": found.step, "from_ranks": saved, "to_ranks": now, "seconds": seconds})
    report({"event": "resume", "step": found.step})
    return found.manifest.metadata
