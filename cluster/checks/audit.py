"""``siloweave audit``: canaries test the engine at the run's plan and at a reference; attacks test what is released.

Everything about an audit is fixed and written down before it starts. Its training reads public text and made-up
canaries only, so that it costs no budget, and is charged to a ledger of its own; records of silos are read only where
they are declared public.
"""

import copy
import json
import secrets
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from cluster.report.attack_page import roc_plot
from cluster.run import Run
from configs.errors import InputError
from configs.schema.schema import RunConfig
from configs.storage.files import digest_json, write_atomic
from configs.storage.layout import CERTIFICATE, FEDERATED, RunFiles
from configs.storage.manifests import MANIFEST, require_manifest
from configs.storage.sealing import load_key
from federated.adapters.warm_model import adaptation
from federated.audit.audit_silo import AuditSilo
from federated.audit.canary_training import AuditSettings, AuditTraining
from federated.audit.hostile_adapters import movements
from federated.audit.membership import infer_membership
from privacy.audit.bound import REFERENCE_PLAN, audited_bound, overall
from privacy.plan import PlanTerms
from privacy.plan_from_settings import plan_terms
from trainer.data.sources import ReadCounts, read_rows
from trainer.models.adapters import adapted
from trainer.models.load import load_model
from trainer.tasks.task import text_task

AUDIT_VERSION = 2  # 2: hostile adapters
SMALLEST, LARGEST = 200, 10_000
_EXAMPLE_CANARIES, _EXAMPLE_TOKENS, _BACKGROUND = 512, 16, 500
_LIBRARIES = ("siloweave", "torch", "opacus", "dp-accounting", "scipy")


def audit(run: Run, canaries: int) -> dict[str, Any]:
    """Audits the engine on a finished run's base model and settings. Returns what ``audit.json`` holds.

    Args:
        run: a run whose federation has finished.
        canaries: gradient canaries of each audit.

    Raises:
        InputError: the run has not finished, its settings are not those that an audit is of, or the number of canaries
            is out of range.
    """
    if run.config.privacy.unit == "client":
        raise InputError("privacy.unit is 'client': an audit is of the engine that trains with records as units")
    if run.config.federated.train != "lora":
        raise InputError(
            f"federated.train is {run.config.federated.train!r}: an audit is of adapters, those of an attacker among "
            "them; audit a run with federated.train = 'lora'"
        )
    if not SMALLEST <= canaries <= LARGEST:
        raise InputError(f"--canaries is {canaries}: give {SMALLEST} to {LARGEST}")
    texts = _public_texts(run.config)
    model = require_manifest(run.model, "model", run.config.model.made_by)
    federations = _finished(run.files)
    base = load_model(run.model, load_key(run.config.run.encryption_key_file))
    directory = run.files.audit
    earlier = _set_aside(directory)
    design = _design(run.config, canaries, model.content_digest)
    write_atomic(directory / "design.json", json.dumps(design, indent=2).encode() + b"\n")
    with run.stage("audit"):
        claims = {
            name: _audit_plan(run, name, PlanTerms(**claim["plan"]), design, copy.deepcopy(base), texts, earlier)
            for name, claim in design["claims"].items()
        }
        hostile = _hostile_adapters(run, base)
        membership = _membership(run, federations)
    findings = {name: claim.pop("_findings") for name, claim in claims.items()}
    document = {
        "version": AUDIT_VERSION,
        "name": run.config.run.name,
        "date": datetime.now(tz=UTC).isoformat(timespec="seconds"),
        "simulation_only": True,
        "design_digest": digest_json(design),
        "earlier_audits": earlier,
        "verdict": overall([finding for found in findings.values() for finding in found]) if _hold(hostile) else "fail",
        "audited_bound": audited_bound(findings["run"]),
        "claims": claims,
        "hostile_adapters": hostile,
        "membership": membership,
        "versions": {name: version(name) for name in _LIBRARIES},
    }
    write_atomic(directory / "roc.svg", roc_of(membership).encode())
    write_atomic(run.files.audit_report, json.dumps(document, indent=2).encode() + b"\n")
    return document


def _finished(files: RunFiles) -> dict[str, Path]:
    require_manifest(files.federated, FEDERATED, "federate")
    candidates = {path.name: path for path in (files.federated, files.no_dp)}
    return {name: path for name, path in candidates.items() if (path / MANIFEST).exists()}


def _set_aside(directory: Path) -> int:
    """Keeps an earlier audit, finished or not: one that failed must not vanish because another one passed."""
    if directory.exists():
        directory.rename(directory.with_name(f"audit-until-{datetime.now(tz=UTC):%Y%m%d-%H%M%S-%f}"))
    return len(list(directory.parent.glob("audit-until-*")))


def _design(config: RunConfig, canaries: int, model_digest: str) -> dict[str, Any]:
    """Everything that is fixed before the first step: canaries, scores, guesses, claims."""
    claims = {}
    # The run's plan by every score; and a plan at which one audit can prove something, with all the error on one score.
    run = plan_terms(config).model_copy(update={"secure_sum": None})  # an audit's one silo adds nothing up
    for name, request, examples in (("run", run, _EXAMPLE_CANARIES), ("reference", REFERENCE_PLAN, 0)):
        settings = AuditSettings(
            gradient_canaries=canaries,
            example_canaries=examples,
            example_tokens=min(_EXAMPLE_TOKENS, config.model.context_length - 2),
            record_count=config.data.private.public_record_count if name == "run" else LARGEST,
            learning_rate=config.federated.learning_rate,
            micro_batch_size=config.federated.micro_batch_size,
        )
        scores = {mode: {"guesses": g, "share": share} for mode, (g, share) in settings.modes(request).items()}
        claims[name] = {"plan": request.model_dump(), "settings": asdict(settings), "scores": scores}
    return {"version": AUDIT_VERSION, "base_model": model_digest, "claims": claims}


def _public_texts(config: RunConfig) -> list[str]:
    """What is trained on beside the canaries."""
    public = config.data.public
    if public is None:
        raise InputError("data.public: missing; an audit trains on public text beside its canaries, so give some")
    return [row[public.text] for row in islice(read_rows(public, [], ReadCounts()), _BACKGROUND)]


def _audit_plan(
    run: Run, name: str, request: PlanTerms, design: dict[str, Any], base: Any, texts: list[str], earlier: int
) -> dict[str, Any]:
    torch.set_num_threads(run.config.cluster.threads_per_rank)
    federated = run.config.federated
    task = text_task(run.config.federated.task_spec, run.model)
    training = AuditTraining(
        request,
        AuditSettings(**design["claims"][name]["settings"]),
        adapted(base, adaptation(federated), run.config.run.seed),
        task,
        [task.encode(text) for text in texts],
        digest_json(design),
    )
    folder = run.files.audit / name
    run_id = f"audit-{name}-{secrets.token_hex(8)}"
    with closing(AuditSilo.open(folder / "silo", training.plan, run_id, digest_json(design))) as silo:
        training.train(_counter(run, f"audit {name}", request.steps), silo.seed)
        findings = training.findings()
        certificate = silo.certificate(findings, earlier)
    write_atomic(folder / CERTIFICATE, json.dumps(certificate, indent=2).encode() + b"\n")
    shown = {
        "epsilon": request.epsilon,
        "delta": request.delta,
        "plan_digest": request.digest,
        "verdict": overall(findings),
        "findings": [finding.as_dict() for finding in findings],
    }
    return {**shown, "_findings": findings, **({"exposure": training.exposure()} if len(findings) > 1 else {})}


def _hostile_adapters(run: Run, base: Any) -> list[dict[str, Any]]:
    """How far one made-up record moves the sum under adapters that a hostile coordinator would send."""
    federated = run.config.federated
    task = text_task(run.config.federated.task_spec, run.model)
    model = adapted(base, adaptation(federated), run.config.run.seed).train()
    return [{**asdict(movement), "holds": movement.holds} for movement in movements(model, task)]


def _hold(hostile: list[dict[str, Any]]) -> bool:
    return all(movement["holds"] for movement in hostile)


def _counter(run: Run, stage: str, steps: int) -> Callable[[], None]:
    done = iter(range(1, steps + 1))
    return lambda: run.log.emit(stage, "scored", done=next(done), of=steps)


def _membership(run: Run, federations: dict[str, Path]) -> dict[str, Any]:
    if not run.config.data.private.public:
        return {"simulation_only": True, "not_available": "the silos' data are not declared public"}
    return infer_membership(run.config, run.model, federations)


def roc_of(membership: dict[str, Any]) -> str:
    """The curves of all attacks on all federations."""
    curves = {
        f"{name}, {attack.replace('_', ' ')}": figures
        for name, attacks in membership.items()
        for attack, figures in (attacks.items() if isinstance(attacks, dict) else ())
    }
    return roc_plot(curves, "Membership inference (simulation only)")


def failure(document: dict[str, Any]) -> str:
    """What has failed, in words."""
    moved = [found["adapter"] for found in document["hostile_adapters"] if not found["holds"]]
    if moved:
        return f"under the hostile adapter {moved[0]!r} one record moves the sum by more than its own clipped gradient"
    return "a lower bound on epsilon exceeds the claim at 99.9% confidence"


def summary(document: dict[str, Any]) -> list[str]:
    """An audit in lines for people."""
    lines = []
    for name, claim in document["claims"].items():
        lines.append(f"{name} plan: epsilon {claim['epsilon']:.3g} (delta {claim['delta']:g}): {claim['verdict']}")
        lines += [
            f"  {found['mode']}: {found['correct']} of {found['guesses']} guesses right; epsilon is at least "
            f"{found['epsilon_lower_bound']:.3g} ({found['confidence']:.0%} confidence)"
            for found in claim["findings"]
        ]
    lines += [
        f"hostile adapter, {found['adapter']}: one record moves the sum by {found['moved']:.5f} C, "
        f"and what others add by {found['beside_its_own']:g} C"
        for found in document["hostile_adapters"]
    ]
    membership = document["membership"]
    if "not_available" in membership:
        lines.append(f"membership inference: not available ({membership['not_available']})")
    for name, attacks in membership.items():
        for attack, figures in attacks.items() if isinstance(attacks, dict) else ():
            if figures["auc"] is None:
                lines.append(f"{name}, {attack}: not available: no silo has a training and a held-out record")
                continue
            rates = ", ".join(f"{rate:.2%} at {at}" for at, rate in figures["true_positive_rate_at"].items())
            lines.append(f"{name}, {attack}: AUC {figures['auc']:.3f}; true positives {rates} (simulation_only)")
    return lines
