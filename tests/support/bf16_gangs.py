"""Gangs of bf16 ranks one after the other: the first commits and goes on, the others go on from its commit.

Ranks write what they hold after the commit or after loading it, and the losses from there: GANG-RANK.pt in a folder for
each ZeRO stage.

python bf16_gangs.py FOLDER
"""

import logging
import multiprocessing
import sys
import warnings
from pathlib import Path

from engine_pair import SAVED, STEPS, VOCABULARY, settings, train
from ports import free_port

from configs.storage.manifests import Manifest, commit_manifest
from configs.storage.storage import COMMITTED, Folder
from trainer.pretraining.startup import import_libraries
from trainer.rank import Rank, join_process_group, prepare_process

GANGS = {"first": 2, "same": 2, "more": 4, "fewer": 1}  # and their ranks
STAGES = (0, 1, 2, 3)
MOMENTS = ("exp_avg", "exp_avg_sq")


def options(stage):
    return ["pretrain.precision=bf16", f"pretrain.zero_stage={stage}"]


def held(engine, stage, moments=MOMENTS):
    """Every parameter's master weights and moments, as DeepSpeed itself gathers them, and the weights it computes with.

    Stage 0 has nothing to gather.
    """
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer, masters, found = engine.optimizer, {}, {}
    if stage == 0:
        groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        masters = {low: high for group, own in groups for low, high in zip(group, own, strict=True)}
    elif stage < 3 and moments:
        # DeepSpeed links them in the first step, when the second group of parameters has no moments yet.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        if stage == 0:
            master = masters[parameter]
            whole = {"fp32": master, **{key: optimizer.state[master][key] for key in moments}}
        else:
            whole = {key: safe_get_full_optimizer_state(parameter, key) for key in moments}
            whole["fp32"] = safe_get_full_fp32_param(parameter)
        with GatheredParameters([parameter], enabled=stage == 3):
            whole["bf16"] = parameter.data
            found[name] = {key: value.detach().clone() for key, value in whole.items()}
    return found


def work(gang, stage, rank, folder):
    """One gang's part of one stage."""
    import torch
    from torch import distributed

    from trainer.checkpoints.checkpoints import KIND, step_name
    from trainer.pretraining.engine import build_engine
    from trainer.pretraining.loop import _resume

    config, found = settings(options(stage), rank.world_size), {}
    engine = build_engine(config, rank, VOCABULARY)
    if gang == "first":
        found["begun"] = held(engine, stage, moments=())
        train(engine, config, rank, 0, SAVED)
        engine.save_checkpoint(folder, tag=step_name(SAVED), save_latest=False)
        if rank.rank == 0:
            made = {"step": SAVED, "world_size": rank.world_size}
            commit_manifest(folder / step_name(SAVED), Manifest(KIND, "bf16", metadata=made), COMMITTED)
        distributed.barrier()
    else:
        _resume(engine, config, Folder(folder), "bf16", rank, lambda event: None)
    found["held"] = held(engine, stage)
    found["steps"] = {float(state["step"]) for state in engine.optimizer.state.values()}
    found["losses"] = train(engine, config, rank, SAVED, STEPS)
    torch.save(found, folder / f"{gang}-{rank.rank}.pt")
    engine.destroy()


def run_rank(gang, number, port, folder):
    rank = Rank(number, GANGS[gang], number, GANGS[gang], "127.0.0.1", port, "cpu", 1)
    warnings.simplefilter("ignore")
    prepare_process(rank)
    join_process_group(rank, 600)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    for stage in STAGES:
        (folder / f"stage-{stage}").mkdir(exist_ok=True)
        work(gang, stage, rank, folder / f"stage-{stage}")


def main():
    # 1. Once for all ranks, which are forked: what they import, at once or when it is first used.
    prepare_process(Rank(0, 1, 0, 1, "127.0.0.1", 0, "cpu", 1))
    import_libraries()
    from trainer.models.families import new_model

    new_model(settings([], 1).model, VOCABULARY, 0)
    # 2. The gangs.
    fork = multiprocessing.get_context("fork")
    for gang, size in GANGS.items():
        port = free_port()
        places = [(gang, number, port, Path(sys.argv[1])) for number in range(size)]
        ranks = [fork.Process(target=run_rank, args=place, daemon=True) for place in places]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(120)
        if any(rank.exitcode for rank in ranks):
            sys.exit(f"{gang}: ranks ended with {[rank.exitcode for rank in ranks]}")


if __name__ == "__main__":
    main()
