"""Evaluation in the clear: on a simulation's public silos (``simulation_only``), and on a public text of one's own."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from configs.errors import PolicyRefusal
from configs.schema.data import RecordSettings
from configs.schema.schema import RunConfig
from configs.schema.silo import SiloConfig
from configs.schema.tasks import WRITTEN, TaskSpec
from configs.storage.sealing import load_key
from federated.adapters.arrays import from_bytes
from federated.adapters.warm_model import adaptation, warm_model
from federated.coordinator import round_commits as commits
from federated.coordinator.outcome import over_flower
from federated.evaluation.private_sums import evaluated
from federated.silo.units import units_of
from federated.simulation.simulation import simulated_silos
from trainer.data.sources import ReadCounts, all_columns
from trainer.scoring.in_full import in_full
from trainer.scoring.score import Score, score, score_in_full
from trainer.tasks.fields import FieldReader
from trainer.tasks.task import Row, kind_of, task_of

BASE, PUBLIC, _SILOS = "base", "public", "silos"
# Of an adapter, None for the base model; on so many records; and whether it is asked for its answers, too.
Scorer = Callable[[bytes | None, int, bool], dict[str, Score]]


def evaluate_rounds(
    ray: Any,
    config: RunConfig,
    base_model: Path,
    federations: Mapping[str, Path],
    on_score: Callable[..., None],
) -> dict[str, Any]:
    """Scores the base model, and every committed round of every federation: on what may be read in the clear.

    These are every public silo's held-out records in a simulation, and the coordinator's own public text. The rounds
    before the last are read on a quarter of the records: they are for a plot. The base model and the last rounds are
    scored in full, over all silos: by the standard libraries, and with intervals.

    Returns:
        {"simulation_only": True, "metric": the task's main figure, "base": by silo, federation: [by silo, for each
        round]}; without these, and with the reason, where the silos can't be read. Under "public" the same of the
        public text, where there is one. What is scored in full has that under "in_full".
    """
    limit = config.evaluate.max_records_per_silo
    models: list[tuple[str, int, bytes | None, int, bool]] = []
    for name, directory in federations.items():
        start, *rounds = commits.all_rounds(directory, load_key(config.run.encryption_key_file))
        if not models:  # what every federation has begun with
            models.append((BASE, 0, None if config.federated.starts_as_base else start.adapter, limit, True))
        for found in rounds:
            last = found is rounds[-1]
            models.append((name, found.round_number, found.adapter, limit if last else max(1, limit // 4), last))
    reason, scorers = _scorers(config, base_model, federations)
    remote = ray.remote(num_cpus=config.cluster.threads_per_rank)(_scored)
    running = {
        remote.remote(config, which, scorer, adapter, records, whole): (which, name, number)
        for which, scorer in scorers.items()
        for name, number, adapter, records, whole in models
    }
    scores: dict[tuple[str, str, int], dict[str, Any]] = {}
    waiting = list(running)
    while waiting:
        (reference,), waiting = ray.wait(waiting)
        scores[running[reference]] = ray.get(reference)
        on_score(done=len(scores), of=len(running))

    def figures(which: str) -> dict[str, Any]:
        keys = sorted(key for key in scores if key[0] == which)
        rounds = {name: [scores[key] for key in keys if key[1] == name] for name in federations}
        return {BASE: scores[which, BASE, 0], **rounds}

    silos = {"not_available": reason} if reason else figures(_SILOS)
    measures = kind_of(config.federated.task).measured(config.federated.task_spec, config.model.context_length)
    kind = {"metric": measures.main, "lower_is_better": measures.lower_is_better}
    return {"simulation_only": True, **kind, **silos, **({PUBLIC: figures(PUBLIC)} if PUBLIC in scorers else {})}


def _scorers(
    config: RunConfig, base_model: Path, federations: Mapping[str, Path]
) -> tuple[str | None, dict[str, Scorer]]:
    """What may be read in the clear; and why the silos may not be."""
    reason, scorers = None, dict[str, Scorer]()
    if any(over_flower(directory) for directory in federations.values()):
        reason = "the silos keep their records"
    elif not config.data.private.public:
        reason = "the silos' data are not declared public"
    else:
        scorers[_SILOS] = partial(score_silos, config, simulated_silos(config, base_model))
    if config.evaluate.public.source:
        scorers[PUBLIC] = partial(score_public, config, base_model)
    return reason, scorers


def _scored(
    config: RunConfig, which: str, scorer: Scorer, adapter: bytes | None, records: int, whole: bool
) -> dict[str, Any]:
    torch.set_num_threads(config.cluster.threads_per_rank)
    found = scorer(adapter, records, whole)
    if not whole:
        return summary(found)
    source = config.evaluate.public if which == PUBLIC else config.data.private
    figures = in_full(_overall(found), config.federated.task_spec, source.language, config.run.seed)
    return {**summary(found), "in_full": figures}


def summary(by_silo: Mapping[str, Score]) -> dict[str, Any]:
    """The figures over all silos, and those of each."""
    silos = {name: {**score.figures, "records": score.records} for name, score in by_silo.items()}
    overall = _overall(by_silo)
    return {**overall.figures, "records": overall.records, "by_silo": silos}


def _overall(by_silo: Mapping[str, Score]) -> Score:
    first, *others = by_silo.values()
    return sum(others, first)


def score_silos(
    config: RunConfig, silos: Mapping[str, SiloConfig], adapter: bytes | None, limit: int, whole: bool = False
) -> dict[str, Score]:
    """``score_held_out`` for several silos."""
    return {name: score_held_out(config, silo, adapter, limit, whole) for name, silo in silos.items()}


def score_public(
    config: RunConfig, base_model: Path, adapter: bytes | None, limit: int, whole: bool = False
) -> dict[str, Score]:
    """The task's figures on the first records of the coordinator's public text.

    Raises:
        InputError: it can't be read.
    """
    source = config.evaluate.public
    spec = config.federated.task_spec.model_copy(update={"language": source.language})
    units = public_units(source, spec, limit)
    return {PUBLIC: _score(config, spec, base_model, config.run.encryption_key_file, units, adapter, whole)}


def public_units(source: RecordSettings, spec: TaskSpec, limit: int) -> list[tuple[Row]]:
    """The first records of a source, each a unit of its own.

    Raises:
        InputError: it can't be read.
    """
    fields, counts = FieldReader(source, spec), ReadCounts()
    read = (fields.read(row, counts.where, found) for row, found in all_columns(source, fields.columns, counts))
    return [(row,) for row in islice(filter(None, read), limit)]


def held_out_units(config: RunConfig, base_model: Path, limit: int) -> list[Sequence[Row]]:
    """The first held-out units of each of a simulation's silos, whose data must be declared public.

    Raises:
        PolicyRefusal: they are not.
    """
    if not config.data.private.public:
        raise PolicyRefusal(
            "the silos' held-out records can be read in the clear only where data.private.public = true",
            rule="public",
            asked="records",
            allowed="data declared public",
        )
    silos = simulated_silos(config, base_model).values()
    return [unit for silo in silos for unit in units_of(silo).held_out[:limit]]


def score_held_out(
    config: RunConfig, silo: SiloConfig, adapter: bytes | None, limit: int, whole: bool = False
) -> Score:
    """The task's figures on a silo's held-out units, read in the clear: ``simulation_only``.

    Args:
        config: the run's settings.
        silo: the silo.
        adapter: safetensors, or None for the base model.
        limit: units read at most.
        whole: whether the model is asked for its answers, too.

    Raises:
        PolicyRefusal: the data is not declared public; an exact figure of private data would leave the silo.
    """
    if not silo.data.public:
        raise PolicyRefusal(
            f"silo {silo.silo.id!r}: exact figures of its held-out records need data declared public = true",
            rule="public",
            asked="exact figures",
            allowed="data declared public",
        )
    units = units_of(silo)
    found = units.held_out[:limit]
    key_file = silo.silo.encryption_key_file
    return _score(config, silo.task_spec, Path(silo.silo.base_model), key_file, found, adapter, whole)


def _score(
    config: RunConfig,
    spec: TaskSpec,
    base_model: Path,
    key_file: str,
    units: Sequence[Sequence[Row]],
    adapter: bytes | None,
    whole: bool,
) -> Score:
    task = task_of(spec, base_model)
    model = warm_model(base_model, adaptation(config.federated, task.head), key_file)
    examples, size = [task.scored(unit) for unit in units], config.federated.micro_batch_size
    most: int | None = config.evaluate.max_new_tokens
    if config.federated.task in WRITTEN and not most:
        most = None
    with evaluated(model, from_bytes(adapter) if adapter else None):
        if whole:
            return score_in_full(model, task, examples, size, most)
        return score(model, task, [example for unit in examples for example in unit], size)
