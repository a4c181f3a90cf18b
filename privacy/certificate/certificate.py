"""The certificate: what a run claims, in one document that can be checked offline.

It is a pure function of the plan and of what the silos signed. Checking it (``check.py``) makes it again.
"""

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from configs.errors import InputError
from privacy.certificate.headline import Claim, everywhere, headline, headline_of_sums
from privacy.certificate.model_digests import ModelDigests
from privacy.ledger.statements import AuditStatement
from privacy.plan import PlanTerms
from privacy.secure_sum import SecureSum

CERTIFICATE_VERSION, READABLE, FIRST_WITH_MODEL, FIRST_WITH_SUMS = 11, (3, 4, 5, 6, 7, 8, 9, 10, 11), 4, 8
FIRST_WITH_SHARED_NOISE, _FIRST_WITH_MASKED_EVALUATIONS, FIRST_WITH_MANDATES_OF_CLIENTS = 9, 10, 11
NOT_AUDITED = "not audited"
AGGREGATOR = "aggregator"
_LIBRARIES = ("siloweave", "torch", "numpy", "randomgen", "opacus", "dp-accounting", "transformers", "peft")
_NOT_COVERED_IN_3 = (  # a change of these words is a new version: checking a certificate makes them again
    "timing: how long a reply takes depends on the size of its batch",
    "a silo whose own machine or key is in the hands of the adversary",
    "a rewrite of a whole ledger together with its anchor by the owner of its key, where nobody keeps a receipt",
    "an old ledger put back together with its anchor, until a coordinator shows a newer receipt",
    "versions: no silo signs them here; each statement has its own silo's",
    "whose keys these are: compare each public key with what its steward gives you",
    "a silo that the coordinator leaves out: only that silo's own ledger shows its charges",
    "float32 rounding inside the clipped sum: one record may change how the others' contributions are rounded",
)
_NOT_COVERED_IN_4 = (
    *_NOT_COVERED_IN_3[:-1],
    "a kernel whose order of instructions depends on values: that records computed together have the bits that "
    "each has alone is proved with made-up records, for each shape and machine",
    "how the coordinator made the model of the releases: each ledger shows its own, and nobody signs the rest",
)
_NOT_COVERED_IN_5 = (
    *_NOT_COVERED_IN_4,
    "what the base model was made from: that it was public text alone is the word of whoever made or declared it",
)
_NOT_COVERED_IN_6 = (
    *_NOT_COVERED_IN_5,
    "what an earlier run has spent where this one continues it (model.continues): that run's own certificate says "
    "it, and both add up for whoever was in both",
)
_NOT_COVERED_IN_7 = (
    *_NOT_COVERED_IN_6,
    "when updates came, which decides their order and weights in buffered rounds (model.rounds): how long a silo "
    "takes depends on its batches",
)
_NOT_COVERED = {
    3: _NOT_COVERED_IN_3,
    4: _NOT_COVERED_IN_4,
    5: _NOT_COVERED_IN_5,
    6: _NOT_COVERED_IN_6,
    7: _NOT_COVERED_IN_7,
    8: _NOT_COVERED_IN_7,
    9: _NOT_COVERED_IN_7,
    10: _NOT_COVERED_IN_7,
    11: _NOT_COVERED_IN_7,
}
_TRUSTED = (
    "the aggregator, which sees every client's update without noise and adds the noise to their sum: this holds "
    "against those who see the model, and not against the aggregator or whoever reads its memory or messages"
)
_ONE_MECHANISM = "one noised sum a round over all clients; all data of a client is one unit"
_SHARED_NOT_COVERED = (
    "silos whose machines are put back to a state of before a sum, whose noise they made together: two sums of the "
    "same shares may differ by one silo's alone",
)
_CLIENTS_NOT_COVERED = (
    "a client that takes part under several names: each name is a unit of its own",
    "who takes part, and in which round: membership and participation are public",
)

_MANDATES_NOT_COVERED = ("a client's mandate that the coordinator leaves out: only that client's own ledger names it",)


def certificate(
    run_id: str,
    plan: PlanTerms,
    ledgers: Mapping[str, Mapping[str, Any]],
    model: ModelDigests | None,
    *,
    mandated: Mapping[str, Mapping[str, Any]] | None = None,
    versions: Mapping[str, str] | None = None,
    form: int = CERTIFICATE_VERSION,
) -> dict[str, Any]:
    """What a finished run claims.

    Args:
        run_id: the run.
        plan: the plan that every silo reserved; with clients as units, the aggregator.
        ledgers: public facts of each silo that has reserved, by name: its last ``receipt`` and, where it has closed the
            run, its ``statement``; the one silo of an audit's run also has the ``audit``. With clients as units, of the
            aggregator alone.
        model: what was made; None for an audit, of which nothing is published.
        mandated: with clients as units, of each silo that had a mandate, by name: ``dataset_id``, ``public_key``, the
            ``mandate``, and the ``receipt`` that names it.
        versions: of the libraries; None takes those that are installed.
        form: version of the document.

    Returns:
        A JSON document. ``epsilon`` is for a unit that is in one silo; ``headline`` is the claim.

    Raises:
        InputError: with clients as units, another ledger than the aggregator's.
    """
    guarantee = plan.guarantee()
    statements = {name: ledger["statement"] for name, ledger in ledgers.items() if "statement" in ledger}
    in_all = everywhere(guarantee.epsilon, plan.delta, len(ledgers), one_sum=plan.noise is not None)
    return {
        "version": form,
        "run_id": run_id,
        "unit": plan.unit,
        "relation": plan.relation,
        "plan": plan.model_dump(mode="json"),
        "plan_digest": plan.digest,
        "headline": asdict(_claim(plan, guarantee.epsilon, statements, list(ledgers))),
        "delta": plan.delta,
        "epsilon": guarantee.epsilon,
        "epsilon_sum": in_all[0],
        "delta_sum": in_all[1],
        "epsilon_optimistic": guarantee.epsilon_optimistic,
        "epsilon_rdp": guarantee.epsilon_rdp,
        "epsilon_prv": guarantee.epsilon_prv,
        "accountant": "dp-accounting PLD, pessimistic",
        "audited": _audited(plan, guarantee.epsilon, ledgers),
        "seeds": _seeds(ledgers, statements),
        "left_each_silo": _left_each_silo(plan, form),
        **({} if form < FIRST_WITH_SUMS or (sums := plan.secure_sum) is None else {"secure_sum": _of_sums(plan, sums)}),
        **_signed_by(plan, ledgers),
        **({"mandates": {name: dict(part) for name, part in mandated.items()}} if mandated else {}),
        **({} if form < FIRST_WITH_MODEL else {"model": _model(model)}),
        "not_covered": [
            *(_CLIENTS_NOT_COVERED if plan.unit == "client" else ()),
            *(_MANDATES_NOT_COVERED if plan.unit == "client" and form >= FIRST_WITH_MANDATES_OF_CLIENTS else ()),
            *(_SHARED_NOT_COVERED if plan.noise is not None else ()),
            *_NOT_COVERED[form],
        ],
        "versions": dict(versions or library_versions()),
    }


def _model(model: ModelDigests | None) -> dict[str, Any] | None:
    """Without what earlier versions had no field for, where there is nothing to say of it."""
    if model is None:
        return None
    nothing = {name for name in ("declared_public_by", "continues") if getattr(model, name) is None}
    return model.model_dump(mode="json", exclude=nothing)


def ledgers_of(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the ledgers behind a certificate have signed, by name: the silos', or the aggregator's."""
    if document.get("unit") == "client":
        return {AGGREGATOR: document[AGGREGATOR]}
    return dict(document.get("silos", {}))


def _signed_by(plan: PlanTerms, ledgers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The signed parts, under names of their own: neither kind of certificate can be read as the other."""
    if plan.unit == "record":
        return {"silos": {name: dict(silo) for name, silo in ledgers.items()}}
    if list(ledgers) != [AGGREGATOR]:
        raise InputError(f"ledgers are of {sorted(ledgers)}: with clients as units give the aggregator's alone")
    return {AGGREGATOR: dict(ledgers[AGGREGATOR]), "num_clients": plan.num_clients, "trusted": _TRUSTED}


def _claim(plan: PlanTerms, epsilon: float, statements: Mapping[str, Mapping[str, Any]], names: list[str]) -> Claim:
    if plan.unit == "client":
        return Claim(epsilon, plan.delta, _ONE_MECHANISM)
    attested = {name: bool(statement["attests_disjoint_units"]) for name, statement in statements.items()}
    if plan.noise is not None:
        return headline_of_sums(names, epsilon, plan.delta, attested, plan.noise.min_honest)
    return headline(dict.fromkeys(names, epsilon), dict.fromkeys(names, plan.delta), attested)


def _audited(plan: PlanTerms, epsilon: float, ledgers: Mapping[str, Mapping[str, Any]]) -> str | dict[str, Any]:
    """What an audit's signed counts show: lower bounds that hold for all its scores together."""
    found = next((ledger["audit"] for ledger in ledgers.values() if "audit" in ledger), None)
    if found is None:
        return NOT_AUDITED
    from privacy.audit.bound import FAIL_CONFIDENCE, WARN_CONFIDENCE, Finding

    statement = AuditStatement.model_validate(found)
    findings = [Finding(**score.model_dump(), epsilon=epsilon, delta=plan.delta) for score in statement.scores]
    scores = [
        {
            **score.model_dump(),
            "box": "black" if score.mode.endswith("black_box") else "white",
            "epsilon_lower_bound_95": finding.bound(WARN_CONFIDENCE),
            "epsilon_lower_bound_99_9": finding.bound(FAIL_CONFIDENCE),
        }
        for score, finding in zip(statement.scores, findings, strict=True)
    ]
    return {
        "epsilon_lower_bound_95": max(score["epsilon_lower_bound_95"] for score in scores),
        "epsilon_lower_bound_99_9": max(score["epsilon_lower_bound_99_9"] for score in scores),
        "scores": scores,
        "design_digest": statement.design_digest,
        "earlier_audits": statement.earlier_audits,
        "of": "this run, of canaries in public text through the engine that silos use; no silo's own training",
    }


def library_versions() -> dict[str, str]:
    """Versions of the libraries that sample, clip, add noise and account."""
    return {name: version(name) for name in _LIBRARIES}


def _left_each_silo(plan: PlanTerms, form: int) -> str:
    if plan.unit == "client":
        how = ", under masks (secure_sum)" if plan.secure_sum else ""
        left = f"one clipped adapter update a round{how}, WITHOUT noise of the silo's own; no loss or count"
        return f"to the aggregator: {left}"
    update = "one noised adapter update a charged round"
    if plan.noise is not None:
        update = "one sum of clipped gradients a charged round, with this silo's share of the noise alone"
    if plan.compression is not None:
        update += ", rounded as plan.compression says"
        update += ", of it and of what earlier ones left out the largest values" if plan.compression.leaves_out else ""
    left = f"{update}{', under masks (secure_sum)' if plan.secure_sum else ''}; no loss, norm or count"
    masked = plan.secure_sum is not None and form >= _FIRST_WITH_MASKED_EVALUATIONS
    how = ", under masks (secure_sum)," if masked else ""
    for metric in plan.metric_releases:
        left += f"; at most {metric.releases} times{how} the noised sums of the metric {metric.name}"
        left += f" with counts of the labels {', '.join(metric.labels)}" if metric.labels else ""
        written = f" with what answers of up to {metric.max_new_tokens} tokens have in common with the right ones"
        left += written if metric.max_new_tokens else ""
    return left


def _of_sums(plan: PlanTerms, terms: SecureSum) -> str:
    """What secure aggregation promises beside epsilon, and what it rests on, in one sentence."""
    if plan.unit == "client":
        return (
            f"each update left under masks, and the aggregator learnt no more of a round's updates than the sum of "
            f"{terms.fewest} or more clients', as long as it kept to the protocol (two rounds from the same model with "
            f"a client in one of them alone would tell it that client's update), at most {terms.colluders} clients "
            "collude with it and each steward's roster has the clients' true keys; epsilon does not rest on it, but on "
            "the aggregator"
        )
    if terms.noise is not None:
        return (
            f"the silos of each sum made its noise together, and epsilon rests on it that at least "
            f"{terms.noise.min_honest} of them were honest, which added their shares and told nobody: what was charged "
            "is the noise of so many, and the coordinator learnt no more of a round than the noised sum of "
            f"{terms.fewest} or more silos' clipped gradients, as long as at most {terms.colluders} silos, any that "
            "looks at a model with its own share in mind among them, collude with it, and each steward's roster has "
            "the silos' true keys"
        )
    return (
        f"each update left under masks, and the coordinator learnt no more of a round's updates than the sum of "
        f"{terms.fewest} or more silos', at least {terms.fewest - terms.colluders} of them honest: as long as at most "
        f"{terms.colluders} silos collude with it and each steward's roster has the silos' true keys; epsilon does not "
        "rest on it"
    )


def _seeds(silos: Mapping[str, Any], statements: Mapping[str, Mapping[str, Any]]) -> str:
    """Where the seeds came from. An injected seed, whose owner can remove the noise, is named first."""
    injected = sorted(name for name, statement in statements.items() if statement["seed_source"] == "injected")
    if injected:
        return f"INJECTED in {', '.join(injected)}: whoever knows the seed can remove the noise"
    unknown = sorted(
        name for name in silos if name not in statements or statements[name]["seed_source"] != "operating system"
    )
    if unknown:
        return (  # without its statement a silo with an injected seed looks like one that has not closed
            f"not stated by {', '.join(unknown)}, where they may be INJECTED: whoever knows such a seed can remove the "
            "noise; else from the operating system, one a charge, erased"
        )
    return "operating system, one a charge, erased when the reply is stored"
