"""The two kinds of trials: pretraining runs, and federations of one base model, which spend epsilon each."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster import pipeline
from cluster.monitoring.listeners import listening
from cluster.run import Run
from cluster.tuning.ray_tune import Kind
from cluster.tuning.search_space import Trial, with_values
from configs.errors import InputError, PolicyRefusal
from configs.events import Listener, read_events
from configs.run_directory import run_directory
from configs.schema.schema import RunConfig
from configs.storage.files import digest_json
from configs.storage.layout import FEDERATED, RunFiles, SiloFiles
from configs.storage.manifests import read_manifest, require_manifest
from trainer.data.origins import since_prepared
from trainer.data.packing import lengths_apart
from trainer.data.tokenizer import special_tokens

_VALIDATIONS = {"validation_loss": "loss", "validation_bits_per_char": "bits_per_char"}
_HELD_OUT, _HELD_OUT_ERROR = "held_out_bits_per_char", "held_out_error"


def validations(config: RunConfig) -> list[dict[str, Any]]:
    """A trial's validations so far, by step; a step that was done again counts as it came out last."""
    events = read_events(RunFiles(run_directory(config)).events, "pretrain")
    found = {event["step"]: event for event in events if event["event"] == "validation"}
    return [{"step": at, **{name: found[at].get(key) for name, key in _VALIDATIONS.items()}} for at in sorted(found)]


def _pretrain(config: RunConfig, on_event: Listener) -> None:
    with listening(config) as listeners:
        pipeline.pretrain(Run(config, (*listeners, on_event)))


def _last_step(config: RunConfig) -> int:
    return config.pretrain.steps


def _own_places(_: RunConfig) -> list[dict[str, float]]:
    """A gang reserves its places by itself."""
    return []


PRETRAIN = Kind(
    tuple(_VALIDATIONS), _pretrain, validations, _last_step, _own_places, comparable=True, one_at_a_time=False
)


def give_corpora(run: Run, trials: Sequence[Trial]) -> None:
    """Prepares each corpus once, and links it into the run directory of every trial that trains on it."""
    for trial in trials:
        key = _shaping(trial.config)
        source = run if key == _shaping(run.config) else _corpus_run(run, trial.config, key)
        corpus = read_manifest(source.files.corpus, "corpus")
        if corpus is None:
            pipeline.prepare(source)
        elif changed := since_prepared(source.config, corpus).changed:
            raise InputError(f"{'; '.join(changed)}; trials share one corpus: bring them back or give another run.name")
        mine = RunFiles(run_directory(trial.config))
        _link(source.files.corpus, mine.corpus)
        _link(source.files.tokenizer, mine.tokenizer)


def _link(target: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)


def _shaping(config: RunConfig) -> str:
    """Digest of the settings that a prepared corpus may depend on."""
    data = config.data.model_dump(exclude={"private"})
    special = special_tokens(config.objective, config.model.context_length)[1:]
    shaping = [data, config.tokenizer.model_dump(), config.model.context_length, config.run.seed]
    return digest_json([*shaping, *([special] if special else []), *lengths_apart(config)])


def _corpus_run(run: Run, config: RunConfig, key: str) -> Run:
    where = {"run.storage": str(run.files.tune / "corpora"), "run.name": key[:16]}
    return Run(with_values(config, where, "tune"))


def held_out(config: RunConfig) -> list[dict[str, Any]]:
    """A figure of the silos' held-out records by round, once a trial is evaluated: lower is better.

    Bits per character of texts; of other tasks their main figure, or what it lacks to 1 where higher is better.
    """
    path = RunFiles(run_directory(config)).evaluation
    if not path.exists():
        return []
    document = json.loads(path.read_text(encoding="utf-8"))
    metric, lower = document.get("metric", "bits_per_char"), document.get("lower_is_better", True)
    name = _HELD_OUT if metric == "bits_per_char" else _HELD_OUT_ERROR
    return [
        {"step": number, name: found[metric] if lower or found[metric] is None else 1 - found[metric]}
        for number, found in enumerate(document[FEDERATED], 1)
    ]


def _federate(config: RunConfig, on_event: Listener) -> None:
    with listening(config) as listeners:
        run = Run(config, (*listeners, on_event))
        pipeline.federate(run)
        pipeline.evaluate(run)


def _last_round(config: RunConfig) -> int:
    return config.federated.rounds


def _workers(config: RunConfig) -> list[dict[str, float]]:
    return [{"CPU": float(config.cluster.threads_per_rank)}] * config.federated.workers


# Stopping a federation early would save time and no epsilon: its reservation is spent whole. One at a time: a silo's
# ledger answers one run after the other.
FEDERATE = Kind((_HELD_OUT,), _federate, held_out, _last_round, _workers, comparable=False, one_at_a_time=True)


def federate_kind(config: RunConfig) -> Kind:
    """What a trial of a federation is, with the figure that its task has."""
    return FEDERATE if config.federated.task == "causal" else replace(FEDERATE, metrics=(_HELD_OUT_ERROR,))


def give_model(run: Run, trials: Sequence[Trial]) -> None:
    """Links the base model into every trial's run directory."""
    for trial in trials:
        _link(run.model, RunFiles(run_directory(trial.config)).model)


def check_budget(run: Run, waiting: Sequence[Trial]) -> None:
    """Refuses a search before it begins where its trials ask for more than a silo's ledger has left.

    Every trial is a reservation of its own, and reservations add up (basic composition).

    Raises:
        InputError: there is no base model, or no public figure to choose by.
        PolicyRefusal: the trials that have not reserved yet need more than is left.
    """
    if run.config.privacy.unit == "client":
        raise InputError("privacy.unit is 'client': a search adds up what silos spend, with unit 'record'; give that")
    if not run.config.data.private.public:
        raise InputError(
            "data.private.public is false: there is no figure of private records to choose a trial by; search on "
            "records declared public, and spend epsilon once, at the end"
        )
    require_manifest(run.model, "model", run.config.model.made_by)
    for silo, (epsilon, delta, bodies) in _left(run.config, run.model).items():
        new = [trial for trial in waiting if not _reserved(trial, bodies)]
        for rule, unit, remaining in (("budget_epsilon", "epsilon", epsilon), ("budget_delta", "delta", delta)):
            asked = sum(float(getattr(trial.config.privacy, unit)) for trial in new)
            if asked > remaining * (1 + 1e-12):
                raise PolicyRefusal(
                    f"silo {silo}: {len(new)} trials reserve {unit} {asked:.4g} together, each one its own, and "
                    f"{max(remaining, 0):.4g} is left (privacy.{rule}); lower --trials or privacy.{unit}",
                    rule=rule,
                    asked=f"{asked:.6g}",
                    allowed=f"{max(remaining, 0):.6g}",
                )


def spent(config: RunConfig, model: Path, trials: Sequence[Trial]) -> dict[str, dict[str, float]]:
    """What the trials have reserved in each silo together: the price of the search, and of the model it chose."""
    found = {}
    for silo, (_, _, bodies) in _left(config, model).items():
        mine = [body for trial in trials if (body := _reserved(trial, bodies))]
        found[silo] = {unit: float(sum(body[unit] for body in mine)) for unit in ("epsilon", "delta")}
    return found


def _left(config: RunConfig, model: Path) -> dict[str, tuple[float, float, list[dict[str, Any]]]]:
    """Epsilon and delta that each simulated silo has left under the settings' policy, and its ledger's entries."""
    from federated.simulation.simulation import simulated_silos
    from privacy.ledger.chain import left, policy_budget, verify_entries
    from privacy.ledger.file import read_only

    found = {}
    for name, silo in simulated_silos(config, model).items():
        path, policy = SiloFiles(Path(silo.silo.state_dir)).ledger, silo.policy
        bodies = verify_entries(read_only(path), str(path)) if path.exists() else []
        epsilon, delta = policy.budget_epsilon, policy.budget_delta
        if bodies:  # the policy in force is the settings', which the silo will record
            epsilon += left(bodies).epsilon - policy_budget(bodies).epsilon
            delta += left(bodies).delta - policy_budget(bodies).delta
        found[name] = (epsilon, delta, bodies)
    return found


def _reserved(trial: Trial, bodies: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The entry with which a trial of an earlier start has paid already."""
    from federated.coordinator.run_ticket import RUN_FILE, open_run
    from privacy.ledger.chain import find

    federation = RunFiles(run_directory(trial.config)).federated
    if not (federation / RUN_FILE).exists():
        return None
    return find(bodies, "reserve", run=open_run(federation, trial.config.federated.run_lifetime_h).id)
