"""Evaluation of a simulation's public silos in the clear. Every figure is ``simulation_only``."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from configs.encryption import load_key
from configs.errors import PolicyRefusal
from configs.schema import RunConfig
from configs.silo import SiloConfig
from federated import commits
from federated.adapters import from_bytes
from federated.silo import warm_model
from federated.silo_data import load_units
from federated.simulation import simulated_silos
from privacy.signing import load_secret
from trainer.data.tokenizer import load_tokenizer
from trainer.evaluation import Score, score
from trainer.models import load_adapter_weights
from trainer.tasks import CausalTask

BASE = "base"


def evaluate_rounds(
    ray: Any,
    config: RunConfig,
    base_model: Path,
    federations: Mapping[str, Path],
    on_score: Callable[..., None],
) -> dict[str, Any]:
    """Scores the base model, and every committed round of every federation, on every silo's held-out records.

    The rounds before the last are read on a quarter of the records: they are for a plot.

    Returns:
        {"simulation_only": True, "base": by silo, federation: [by silo, a round]}; without figures, and with the
        reason, where the silos' data are not public.
    """
    if not config.data.private.public:
        return {"simulation_only": True, "not_available": "the silos' data are not declared public"}
    silos, limit = simulated_silos(config, base_model), config.evaluate.max_records_per_silo
    jobs: list[tuple[str, int, bytes | None, int]] = [(BASE, 0, None, limit)]
    for name, directory in federations.items():
        rounds = commits.all_rounds(directory, load_key(config.run.encryption_key_file))[1:]
        for found in rounds:
            records = limit if found is rounds[-1] else max(1, limit // 4)
            jobs.append((name, found.round_number, found.adapter, records))
    scorer = ray.remote(num_cpus=config.cluster.threads_per_rank)(score_silos)
    running = {
        scorer.remote(config, silos, adapter, records): (name, number) for name, number, adapter, records in jobs
    }
    scores: dict[tuple[str, int], dict[str, Score]] = {}
    waiting = list(running)
    while waiting:
        (reference,), waiting = ray.wait(waiting)
        scores[running[reference]] = ray.get(reference)
        on_score(done=len(scores), of=len(jobs))
    found_scores = {name: [_summary(scores[key]) for key in sorted(scores) if key[0] == name] for name in federations}
    return {"simulation_only": True, BASE: _summary(scores[BASE, 0]), **found_scores}


def _summary(by_silo: Mapping[str, Score]) -> dict[str, Any]:
    overall = sum(by_silo.values(), Score(0.0, 0, 0))
    silos = {name: {"bits_per_char": score.bits_per_char, "records": score.records} for name, score in by_silo.items()}
    return {"bits_per_char": overall.bits_per_char, "records": overall.records, "by_silo": silos}


def score_silos(
    config: RunConfig, silos: Mapping[str, SiloConfig], adapter: bytes | None, limit: int
) -> dict[str, Score]:
    """``score_held_out`` for several silos, in a worker process."""
    torch.set_num_threads(config.cluster.threads_per_rank)
    return {name: score_held_out(config, silo, adapter, limit) for name, silo in silos.items()}


def score_held_out(config: RunConfig, silo: SiloConfig, adapter: bytes | None, limit: int) -> Score:
    """Bits per character on a silo's held-out units, read in the clear: ``simulation_only``.

    Args:
        config: the run's settings.
        silo: the silo.
        adapter: safetensors, or None for the base model.
        limit: units read at most.

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
    units = load_units(silo, load_secret(Path(silo.silo.state_dir) / "split.key"))
    base_model = Path(silo.silo.base_model)
    task = CausalTask(load_tokenizer(base_model), config.model.context_length)
    key_file = silo.silo.encryption_key_file
    model = warm_model(base_model, config.federated.lora_rank, config.federated.lora_alpha, key_file)
    records = [task.encode(text) for text in units.held_out[:limit]]
    if adapter is None:
        with model.disable_adapter():
            return score(model.eval(), task, records, config.federated.micro_batch_size)
    load_adapter_weights(model, {key: torch.from_numpy(value) for key, value in from_bytes(adapter).items()})
    return score(model.eval(), task, records, config.federated.micro_batch_size)
