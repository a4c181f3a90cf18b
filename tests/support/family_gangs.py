"""Gangs of ranks that pretrain models of several families: alone, killed on two ranks, and continued on two.

Rank 0 of each gang writes its losses: FAMILY/GANG.json.

python family_gangs.py FOLDER
"""

import json
import logging
import multiprocessing
import os
import signal
import sys
import warnings
from pathlib import Path

from ports import free_port

from configs.load import load
from trainer.pretraining.startup import import_libraries
from trainer.rank import Rank, prepare_process

FAMILIES = {
    "bert": ["pretrain.objective=next_sentence", "data.packing=documents"],
    "t5": [],
    "gru": ["model.context_length=16"],
}
GANGS = {"alone": 1, "killed": 2, "continued": 2}  # and their ranks
STEPS, COMMIT = 8, 3
TEXTS = [
    f"Ship {number} has a crew of {number % 7} and sails to the {number % 11}th island." * 3 for number in range(400)
]


def settings(folder, family, world_size=1):
    overrides = [
        f"run.storage={folder}", f"model.family={family}", f"data.public.source={folder / 'text.jsonl'}",
        "data.near_duplicate_similarity=0.95", "tokenizer.vocab_size=300", f"cluster.world_size={world_size}",
        f"pretrain.steps={STEPS}", f"pretrain.commit_every={COMMIT}", f"pretrain.validate_every={STEPS}",
    ]  # fmt: skip
    return load("tiny", [*overrides, *FAMILIES[family]])


def run_rank(folder, family, gang, number, port):
    from trainer.pretraining.loop import pretrain

    rank = Rank(number, GANGS[gang], number, GANGS[gang], "127.0.0.1", port, "cpu", 1)
    warnings.simplefilter("ignore")
    prepare_process(rank)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    events = []

    def enter(step, phase):
        # The commit before this one stands by now, and this one has not begun.
        if gang == "killed" and (step, phase) == (2 * COMMIT, "save"):
            os.kill(os.getpid(), signal.SIGKILL)

    def report(event):
        events.append({name: event[name] for name in ("event", "step", "loss") if name in event})
        (folder / family / f"{gang}.json").write_text(json.dumps(events))

    run = folder / family / ("alone" if gang == "alone" else "two")
    pretrain(settings(folder, family, GANGS[gang]), run, rank, report, enter, lambda: None)


def main():
    folder = Path(sys.argv[1])
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    # Once for all ranks, which are forked: what they import.
    prepare_process(Rank(0, 1, 0, 1, "127.0.0.1", 0, "cpu", 1))
    import_libraries()
    from trainer.data.prepare import prepare
    from trainer.models.families import empty_model

    fork = multiprocessing.get_context("fork")
    for family in FAMILIES:
        config = settings(folder, family)
        for run in ("alone", "two"):
            prepare(config, folder / family / run)
        empty_model(config.model, 300, config.objective)
        for gang, size in GANGS.items():
            port = free_port()
            ranks = [fork.Process(target=run_rank, args=(folder, family, gang, number, port)) for number in range(size)]
            for rank in ranks:
                rank.start()
            for rank in ranks:
                rank.join(120)
            expected = -signal.SIGKILL if gang == "killed" else 0
            if any(rank.exitcode != expected for rank in ranks):
                sys.exit(f"{family}, {gang}: ranks ended with {[rank.exitcode for rank in ranks]}")


if __name__ == "__main__":
    main()
