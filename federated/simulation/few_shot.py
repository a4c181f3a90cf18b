"""What a base model answers before any fine-tuning: by its prompts alone, or after worked examples (Brown et al. 2020).

Only a simulation's public records are read, and figures of them are exact: ``simulation_only``.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import InputError
from configs.printing import FIGURES, rounded
from configs.schema.schema import RunConfig
from configs.storage.layout import FEDERATED, NO_DP
from configs.storage.sealing import load_key
from federated.silo.units import Units, load_units
from federated.simulation.in_the_clear import BASE, summary
from federated.simulation.public_silo import own_split_key
from federated.simulation.simulation import simulated_silos
from trainer.models.load import load_model
from trainer.scoring.score import score
from trainer.tasks.task import Encoded, PromptedTask, Row, Task, task_of


def score_base(config: RunConfig, base_model: Path, shots: int) -> dict[str, Any]:
    """The base model's figures on the held-out records that ``evaluate_rounds`` reads.

    Args:
        config: the run's settings.
        base_model: exported model directory.
        shots: worked examples before each prompt, the same for all records: training records of any silo.

    Returns:
        {"simulation_only": True, "metric": the task's main figure, "lower_is_better", "shots", "base": by silo}

    Raises:
        InputError: the data are not declared public; the task needs a head, or has no prompts for worked examples;
            there are too few records for these, or they leave too little of the context.
    """
    _check(config)
    task = task_of(config.federated.task_spec, base_model)
    units = {name: load_units(silo, own_split_key(silo)) for name, silo in simulated_silos(config, base_model).items()}
    asked = _with_shots(task, list(units.values()), shots, config.run.seed)
    limit = config.evaluate.max_records_per_silo
    found = {name: _examples(asked, own.held_out[:limit]) for name, own in units.items()}
    if shots:
        alone = [one for own in units.values() for one in _examples(task, own.held_out[:limit])]
        _check_room(config, shots, len(alone), [one for examples in found.values() for one in examples])
    model = load_model(base_model, load_key(config.run.encryption_key_file))
    size = config.federated.micro_batch_size
    scores = {name: score(model, asked, examples, size) for name, examples in found.items()}
    kind = {"metric": task.measures.main, "lower_is_better": task.measures.lower_is_better}
    return {"simulation_only": True, **kind, "shots": shots, BASE: summary(scores)}


def lines(found: dict[str, Any]) -> list[str]:
    """The same, and what was fine-tuned where that stands beside it, for people."""
    metric, shots = found["metric"], found["shots"]
    names = {BASE: f"base model, {shots or 'no'} worked examples"}
    names |= {FEDERATED: "federated with DP", NO_DP: "federated without DP"}
    return [
        f"{shown}: {FIGURES[metric]} {rounded(found[name][metric])} on {found[name]['records']} public records"
        for name, shown in names.items()
        if name in found
    ]


def _check(config: RunConfig) -> None:
    if not config.data.private.public:
        raise InputError(
            "evaluate --base: reads the silos' records in the clear, and needs data declared data.private.public = true"
        )
    if not config.federated.task_spec.in_words:
        raise InputError(
            f"evaluate --base: the task {config.federated.task!r} needs a head, which only training can give; run "
            "`siloweave evaluate` after it, or let a decoder find labels by federated.pooling = 'likelihood'"
        )


def _with_shots(task: Task, units: Sequence[Units], shots: int, seed: int) -> Task:
    if not shots:
        return task
    if not isinstance(task, PromptedTask):
        raise InputError(f"evaluate --shots {shots}: a plain text has no prompt; leave it out, or give another task")
    rows = [row for own in units for unit in own.train for row in unit]
    if len(rows) < shots:
        raise InputError(f"evaluate --shots {shots}: there are {len(rows)} training records; give at most that")
    return task.with_shots(drawn(rows, shots, seed))


def drawn(rows: Sequence[Row], number: int, seed: int) -> list[Row]:
    """So many of the rows, by the seed alone; where they have labels, as many of each as there are."""
    chance, seen = np.random.default_rng(seed), Counter[Any]()
    turns = list[tuple[int, Row]]()
    for index in chance.permutation(len(rows)):
        label = rows[index].get("label")
        turns.append((seen[label], rows[index]))
        seen[label] += 1
    first = sorted(turns, key=lambda turn: turn[0])[:number]  # the first one of each label, then the second ones
    return [first[index][1] for index in chance.permutation(number)]


def _examples(task: Task, units: Sequence[Sequence[Row]]) -> list[Encoded]:
    return [example for unit in units for example in task.scored(unit)]


def _check_room(config: RunConfig, shots: int, number: int, examples: Sequence[Encoded]) -> None:
    """A prompt that is cut is another one, and no figure beside it means the same."""
    wrong = number - len(examples) + sum(example.truncated for example in examples)
    if wrong:
        raise InputError(
            f"evaluate --shots {shots}: after the worked examples {wrong} of {number} prompts do not fit "
            f"model.context_length ({config.model.context_length}); give fewer examples, or a longer context"
        )
