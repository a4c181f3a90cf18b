"""``report.json`` for machines: every figure is read from the run's own files, none is computed anew from data."""

import statistics
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster.report.explained import explanations_of
from cluster.report.showcase import showcase_of
from configs.errors import InputError
from configs.events import read_events
from configs.parse import json_object, reading, to_toml
from configs.schema.schema import RunConfig
from configs.storage.layout import EVENTS, FEDERATED, NO_DP, RunFiles, SiloFiles
from configs.storage.manifests import require_manifest
from federated.coordinator.outcome import over_flower
from federated.simulation.simulated_places import simulated_ledger, simulated_silo
from privacy.certificate.certificate import CERTIFICATE_VERSION, ledgers_of
from privacy.ledger.chain import verify_entries
from privacy.ledger.file import read_only
from trainer.data.reading.counts import of_corpora

REPORT_VERSION = 1
BITS = "bits_per_char"
LOOK = "`siloweave status` says what of the run can be read"
_SIMULATION_ONLY = (
    "federated.by_silo",
    "federated.by_round",
    "federated.in_full.silos",
    "privacy.silos.*.charges",
    "privacy.silos.*.rounds_charged",
)
_LIBRARIES = ("siloweave", "torch", "ray", "deepspeed", "flwr", "opacus", "dp-accounting", "transformers", "peft")


def build(config: RunConfig, run_directory: Path) -> dict[str, Any]:
    """The report of a finished run, on the machine that it ran on.

    A run over silos elsewhere has what the coordinator knows: their ledgers stay with them, and the base model may have
    come from another machine.

    Raises:
        InputError: a stage has not finished; the message names the command.
    """
    files = RunFiles(run_directory)
    manifest = require_manifest(files.federated, FEDERATED, "federate")
    elsewhere = over_flower(files.federated)
    evaluation = {} if elsewhere and not files.evaluation.exists() else _read(files.evaluation, "evaluate")
    certificate = _read(files.certificate, "federate")
    events, rounds = (list(read_events(path)) for path in (files.events, files.federated / EVENTS))
    with reading(files.certificate, LOOK):
        if certificate["version"] > CERTIFICATE_VERSION:
            raise InputError(f"{files.certificate}: a newer Siloweave wrote it; upgrade Siloweave")
        ledgers = {} if elsewhere else _ledgers(config, run_directory, certificate)
        privacy, model = _privacy(config, certificate, ledgers), _model(certificate)
    with reading(files.events, LOOK):
        text, pretrain, seconds = _text(events), _pretrain(config, events), _seconds(events)
    with reading(files.evaluation if evaluation else files.federated / EVENTS, LOOK):
        federated = _federated(config, run_directory, certificate, evaluation, rounds)
    with reading(files.sample, LOOK):
        sample = files.sample.read_text(encoding="utf-8") if files.sample.exists() else ""
    with reading(files.explanations, LOOK):
        explanations = explanations_of(files.explanations, manifest.content_digest)
    with reading(files.showcase, LOOK):
        showcase = showcase_of(files.showcase, files.showcase_page, manifest.content_digest)
    return {
        "version": REPORT_VERSION,
        "name": config.run.name,
        "text": text,
        "pretrain": pretrain,
        "federated": federated,
        "privacy": privacy,
        "model": model,
        "sample": sample,
        "explanations": explanations,
        "showcase": showcase,
        "simulation_only": [] if elsewhere else [f"federated.{federated['metric']}_*", *_SIMULATION_ONLY],
        "settings": to_toml(config),
        "versions": {name: version(name) for name in _LIBRARIES},
        "seconds": seconds,
    }


def in_full(evaluation: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Whose records were scored in full, and there for each model what was found."""
    found = {"silos": evaluation, "public": evaluation.get("public") or {}}
    return {
        whose: {
            model: entry["in_full"]
            for model, entry in (("base", of.get("base")), ("dp", _last(of, FEDERATED)), ("no_dp", _last(of, NO_DP)))
            if entry and "in_full" in entry  # an earlier version scored nothing in full
        }
        for whose, of in found.items()
    }


def _last(evaluation: dict[str, Any], federation: str) -> dict[str, Any] | None:
    rounds = evaluation.get(federation)
    return rounds[-1] if rounds else None


def missing(evaluation: dict[str, Any]) -> list[str]:
    """Why some figures are not there, each reason once."""
    models = [model for whose in in_full(evaluation).values() for model in whose.values()]
    return list(dict.fromkeys(line for model in models for line in model["missing"]))


def _text(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What preparation did to the public text; nothing where the base model came from elsewhere."""
    corpora = [event for event in events if (event["stage"], event["event"]) == ("prepare", "corpus")]
    return [asdict(change) for change in of_corpora(corpora[-1])] if corpora else []


def _ledgers(config: RunConfig, run_directory: Path, certificate: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What each ledger of a simulation says of the run, verified."""
    found = {}
    for name, public in ledgers_of(certificate).items():
        ledger = SiloFiles(_ledger_folder(config, name, run_directory)).ledger
        bodies = verify_entries(read_only(ledger), str(ledger), public["public_key"])
        found[name] = [body for body in bodies if body.get("run") == certificate["run_id"]]
    return found


def _read(path: Path, command: str) -> dict[str, Any]:
    if not path.exists():
        raise InputError(f"{path}: not there yet; run `siloweave {command}` first")
    with reading(path, f"run `siloweave {command}` again"):
        return json_object(path.read_bytes(), str(path))


def _pretrain(config: RunConfig, events: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Nothing where the base model came from elsewhere."""
    # A restart does some steps again; the last time counts.
    steps = {event["step"]: event for event in events if (event["stage"], event["event"]) == ("pretrain", "step")}
    validations = [event for event in events if (event["stage"], event["event"]) == ("pretrain", "validation")]
    ordered = [steps[step] for step in sorted(steps)]
    if not ordered:
        return None
    steady = [event["tokens"] / event["seconds"] for event in ordered[len(ordered) // 10 :]]
    return {
        "world_size": config.cluster.world_size,
        "zero_stage": config.pretrain.zero_stage,
        "steps": len(ordered),
        "tokens": sum(event["tokens"] for event in ordered),
        "tokens_per_s": statistics.median(steady),
        "loss_first": ordered[0]["loss"],
        "loss_last": ordered[-1]["loss"],
        "validation_bits_per_char": validations[-1].get("bits_per_char") if validations else None,
        "restarts": sum(event["event"] == "restart" for event in events),
        "rollbacks": [event["skipped_batches"] for event in events if event["event"] == "rollback"],
        "losses": [round(event["loss"], 4) for event in ordered],
    }


def _federated(
    config: RunConfig,
    run_directory: Path,
    certificate: dict[str, Any],
    evaluation: dict[str, Any],
    events: list[dict[str, Any]],
) -> dict[str, Any]:
    rounds = [event for event in events if event["event"] == "round"]
    public = evaluation.get("public") or {}
    dp, no_dp = evaluation.get(FEDERATED) or [], evaluation.get(NO_DP) or []
    base, metric = evaluation.get("base"), evaluation.get("metric", BITS)

    def overall(entry: dict[str, Any] | None) -> float | None:
        return entry[metric] if entry else None

    return {
        "silos": certificate.get("num_clients", len(ledgers_of(certificate))),
        "rounds": config.federated.rounds,
        "round_rules": config.federated.round_rules,
        "bytes_per_round": statistics.median(event["bytes"] for event in rounds) if rounds else None,
        "full_model_bytes": (RunFiles(run_directory).model / "model.safetensors").stat().st_size,
        "metric": metric,
        f"{metric}_base": overall(base),
        f"{metric}_dp": overall(dp[-1]) if dp else None,
        f"{metric}_no_dp": overall(no_dp[-1]) if no_dp else None,
        "improvement_dp": _improvement(metric, overall(base), overall(dp[-1]) if dp else None),
        "by_silo": _by_silo(metric, base, dp, no_dp) if base and dp else {},
        "by_round": {"dp": [overall(entry) for entry in dp], "no_dp": [overall(entry) for entry in no_dp]},
        "public_text": [overall(entry) for entry in (public["base"], *public["federated"])] if public else [],
        "private_evaluation": _private_evaluations(events),
        "in_full": in_full(evaluation),
        "not_available": evaluation.get("not_available"),
    }


def _private_evaluations(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the silos released of their held-out units, noise included; a restart asks again and gets the same."""
    found = {event["round"]: event for event in events if event["event"] == "private_evaluation"}
    about = ("time", "stage", "event")
    return [{name: value for name, value in found[number].items() if name not in about} for number in sorted(found)]


def _by_silo(
    metric: str, base: dict[str, Any], dp: list[dict[str, Any]], no_dp: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        name: {
            "records": silo["records"],
            f"{metric}_base": silo[metric],
            f"{metric}_dp": dp[-1]["by_silo"][name][metric],
            f"{metric}_no_dp": no_dp[-1]["by_silo"][name][metric] if no_dp else None,
        }
        for name, silo in base["by_silo"].items()
    }


def _improvement(metric: str, before: float | None, after: float | None) -> float | None:
    """As a share of what was: bits per character fall as a model gets better, other figures rise."""
    if not before or after is None:
        return None
    return 1 - after / before if metric == BITS else after / before - 1


def _privacy(
    config: RunConfig, certificate: dict[str, Any], ledgers: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    silos = {}
    for name, public in ledgers_of(certificate).items():
        stated = public.get("statement", {}).get("rounds_charged")
        if stated is not None and not 0 <= stated <= config.federated.rounds:
            raise ValueError("more rounds than the run has")
        charges = [body["round"] for body in ledgers.get(name, ()) if body["kind"] == "charge"]
        silos[name] = {
            "epsilon": public["receipt"]["epsilon_reserved"],
            "budget_epsilon": config.privacy.budget_epsilon if ledgers else None,  # the steward's own
            "epsilon_left": public["receipt"]["epsilon_left"],
            "public_record_count": public["public_record_count"],
            "charges": len(charges) if ledgers else stated,
            "rounds_charged": sum(number > 0 for number in charges) if ledgers else stated,
            "ledger_head": public["receipt"]["head"],
            "public_key": public["public_key"],
            "stated": "statement" in public,
        }
    return {
        "unit": certificate["unit"],
        "relation": certificate["relation"],
        "delta": certificate["delta"],
        "headline": certificate["headline"],
        "trusted": certificate.get("trusted"),
        "epsilon": max(silo["epsilon"] for silo in silos.values()),
        "epsilon_sum": sum(silo["epsilon"] for silo in silos.values()),
        "epsilon_rdp": certificate["epsilon_rdp"],
        "epsilon_prv": certificate["epsilon_prv"],
        "plan": certificate["plan"],
        "noise_multiplier": certificate["plan"]["noise_multiplier"],
        "sampling_rate": certificate["plan"]["sampling_rate"],
        "max_grad_norm": certificate["plan"]["max_grad_norm"],
        "steps_per_round": certificate["plan"]["steps_per_round"],
        "silos": silos,
        "audited": certificate["audited"],
        "seeds": certificate["seeds"],
        "left_each_silo": certificate["left_each_silo"],
        "secure_sum": certificate.get("secure_sum"),
        "not_covered": certificate["not_covered"],
    }


def _model(certificate: dict[str, Any]) -> dict[str, Any] | None:
    """Of which model the certificate speaks; None where an earlier version made it, which did not say so."""
    model = certificate.get("model")
    return {name: model.get(name) for name in ("base_model", "adapter", "declared_public_by")} if model else None


def _ledger_folder(config: RunConfig, name: str, run_directory: Path) -> Path:
    if config.privacy.unit == "client":
        return simulated_ledger(config)
    return Path(simulated_silo(config, name, RunFiles(run_directory).model).silo.state_dir)


def _seconds(events: list[dict[str, Any]]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for event in events:
        if event["event"] == "end":
            seconds[event["stage"]] = round(seconds.get(event["stage"], 0.0) + event["seconds"], 2)
    return seconds
