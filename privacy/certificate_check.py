"""Checks a certificate offline: makes it again from its plan and signed parts, and looks for it in a silo's ledger."""

import math
from collections.abc import Mapping
from typing import Any

from configs.errors import InputError, PolicyRefusal
from configs.load import parse
from privacy.certificate import AGGREGATOR, CERTIFICATE_VERSION, NOT_AUDITED, certificate, ledgers_of
from privacy.plan import PlanRequest
from privacy.runs import Runs
from privacy.size import check_size
from privacy.statements import AuditStatement, Receipt, RunStatement

_TOLERANCE = 1e-6  # accountants differ by less between machines
_SILO_FIELDS = {"dataset_id", "public_key", "public_record_count", "receipt", "statement", "audit"}


def check_certificate(document: Mapping[str, Any], origin: str) -> None:
    """Replays all that a certificate claims.

    Args:
        document: its JSON.
        origin: file name, for the message.

    Raises:
        InputError: a field is missing or is not what the plan and the silos' signatures give; the message names it. Or
            an audit's lower bound at 99.9% confidence is above epsilon.
    """
    if document.get("version") != CERTIFICATE_VERSION:
        raise InputError(f"{origin}: version is {document.get('version')!r}, expected {CERTIFICATE_VERSION}")
    for name in ("run_id", "plan", "versions"):
        if name not in document:
            raise InputError(f"{origin}: {name}: missing; the certificate was edited")
    plan = _accountable(parse(PlanRequest, document["plan"], f"{origin}: plan"), origin)
    signers = AGGREGATOR if plan.unit == "client" else "silos"
    if signers not in document:
        raise InputError(f"{origin}: {signers}: missing, with unit {plan.unit!r}; the certificate was edited")
    if document.get("plan_digest") != plan.digest:
        raise InputError(f"{origin}: plan_digest is {document.get('plan_digest')!r}, plan's is {plan.digest!r}: edited")
    run, parts = document["run_id"], _mapping(document[signers], f"{origin}: {signers}")
    if not parts:
        raise InputError(f"{origin}: {signers}: none; a certificate is of the ledgers that have reserved")
    ledgers = {AGGREGATOR: parts} if plan.unit == "client" else parts
    if len(ledgers) > 1 and any(isinstance(part, Mapping) and "audit" in part for part in ledgers.values()):
        raise InputError(f"{origin}: silos: {len(ledgers)}, and one has an audit, which is of one silo; edited")
    signed = {name: _signed(part, name, run, plan, _where(origin, plan.unit, name)) for name, part in ledgers.items()}
    versions = _mapping(document["versions"], f"{origin}: versions")
    if not all(isinstance(version, str) for version in versions.values()):
        raise InputError(f"{origin}: versions: not all are strings; the certificate was edited")
    again = certificate(run, plan, signed, versions=versions)
    _compare(document, again, "", origin)
    if again["audited"] != NOT_AUDITED and (bound := again["audited"]["epsilon_lower_bound_99_9"]) > plan.epsilon:
        raise InputError(f"{origin}: audited: epsilon is at least {bound:.4g} (99.9% confidence): its claim is false")


def _accountable(plan: PlanRequest, origin: str) -> PlanRequest:
    """A stranger's plan, before it is accounted for."""
    try:
        check_size(plan.schedule)
    except PolicyRefusal as refusal:
        raise InputError(f"{origin}: plan: {refusal}") from None
    return plan


def _where(origin: str, unit: str, name: str) -> str:
    return f"{origin}: {name}" if unit == "client" else f"{origin}: silos.{name}"


def _signed(value: Any, name: str, run: str, plan: PlanRequest, where: str) -> dict[str, Any]:
    """A ledger's part as its signatures give it; whatever else was written there is then found by comparing."""
    silo, epsilon = dict(_mapping(value, where)), plan.epsilon
    for field in sorted(silo.keys() - _SILO_FIELDS):
        raise InputError(f"{where}.{field}: no such field, and nothing signs it; the certificate was edited")
    receipt = _check_receipt(silo, name, run, plan, epsilon, where)
    found = {**silo, "receipt": receipt.model_dump(mode="json")}
    if "statement" in silo:
        statement = _check_statement(silo, name, run, plan, epsilon, where)
        found["statement"] = statement.model_dump(mode="json")
    elif plan.unit == "client":
        raise InputError(f"{where}.statement: missing; an aggregator closes a run before it certifies")
    if plan.unit == "client" and receipt.public_record_count != plan.num_clients:
        count = receipt.public_record_count
        raise InputError(f"{where}.public_record_count is {count}, the plan has {plan.num_clients} clients")
    if "audit" in silo:
        if plan.unit == "client":
            raise InputError(f"{where}.audit: an audit is of the engine that trains with records as units; edited")
        found["audit"] = _check_audit(silo, name, run, plan, f"{where}.audit").model_dump(mode="json")
    return found


def check_in_ledger(document: Mapping[str, Any], bodies: list[dict[str, Any]], hashes: list[str], origin: str) -> str:
    """Looks for a checked certificate's run in one silo's verified ledger.

    Args:
        document: the certificate.
        bodies: the ledger's entries, oldest first.
        hashes: their hashes.
        origin: the certificate's file name, for the message.

    Returns:
        The silo's name.

    Raises:
        InputError: no silo of the certificate has this ledger's key, a head is not in its chain, or its reservation and
            charges are not what the silo stated.
    """
    key = bodies[0]["public_key"]
    ledgers = ledgers_of(document)
    name = next((name for name, ledger in ledgers.items() if ledger["public_key"] == key), None)
    if name is None:
        raise InputError(f"{origin}: none has the ledger's key {key[:16]}…; give the ledger of one of them")
    silo, run, where = ledgers[name], document["run_id"], _where(origin, document["unit"], name)
    for part in ("receipt", "statement"):
        if part in silo and hashes[silo[part]["number"] - 1 : silo[part]["number"]] != [silo[part]["head"]]:
            raise InputError(f"{where}.{part}.head: not in the ledger's chain; give this silo's whole, newest ledger")
    found = _in_chain(bodies, run, silo.get("statement", silo["receipt"]))
    if found is None:
        raise InputError(f"{where}: the ledger holds no reservation of run {run}")
    for field, value in found.items():
        if "statement" in silo and silo["statement"][field] != value:
            raise InputError(f"{where}.statement.{field} is {silo['statement'][field]!r}, the ledger has {value!r}")
    return str(name)


def _in_chain(bodies: list[dict[str, Any]], name: str, signed: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a ledger says of the run that was signed for: of those with its name, the one that ended where it says."""
    runs = [run for run in Runs(bodies) if run.name == name and run.opening["kind"] == "reserve"]
    facts = [
        {
            "plan_digest": run.opening["plan_digest"],
            "public_record_count": run.opening["public_record_count"],
            "rounds_charged": run.rounds_charged,
            "number": run.closing["number"] if run.closing else None,
        }
        for run in runs
    ]
    alike = [sum(fact[name] == signed[name] for name in ("number", "plan_digest")) for fact in facts]
    return facts[alike.index(max(alike))] if facts else None


def _check_receipt(
    silo: Mapping[str, Any], name: str, run: str, plan: PlanRequest, epsilon: float, where: str
) -> Receipt:
    receipt = parse(Receipt, silo.get("receipt", {}), f"{where}.receipt")
    spent = {"epsilon_reserved": epsilon, "delta_reserved": plan.delta}
    _expect(receipt, {**_in_both(silo, name, run, plan), **spent}, f"{where}.receipt")
    return receipt


def _check_statement(
    silo: Mapping[str, Any], name: str, run: str, plan: PlanRequest, epsilon: float, where: str
) -> RunStatement:
    statement = parse(RunStatement, silo["statement"], f"{where}.statement")
    spent = {"epsilon": epsilon, "delta": plan.delta}
    _expect(statement, {**_in_both(silo, name, run, plan), **spent}, f"{where}.statement")
    if statement.rounds_charged > plan.rounds:
        raise InputError(f"{where}.statement.rounds_charged is {statement.rounds_charged}, the plan has {plan.rounds}")
    return statement


def _check_audit(silo: Mapping[str, Any], name: str, run: str, plan: PlanRequest, where: str) -> AuditStatement:
    audit = parse(AuditStatement, silo["audit"], where)
    expected = _in_both(silo, name, run, plan)
    del expected["public_record_count"]
    _expect(audit, expected, where)
    if "statement" not in silo:
        raise InputError(f"{where}: of a run that is not closed; the certificate was edited")
    if sum(score.share for score in audit.scores) > 1 + _TOLERANCE:
        raise InputError(f"{where}.scores: their shares of the allowed error add up to more than 1; do not trust it")
    for score in audit.scores:
        if not score.correct <= score.guesses <= score.canaries:
            raise InputError(f"{where}.scores: {score.mode}: counts that don't fit together; do not trust it")
    return audit


def _in_both(silo: Mapping[str, Any], name: str, run: str, plan: PlanRequest) -> dict[str, Any]:
    """What a receipt and a statement of the same run both say."""
    return {
        "silo": name,
        "dataset": silo.get("dataset_id"),
        "public_key": silo.get("public_key"),
        "public_record_count": silo.get("public_record_count"),
        "run": run,
        "plan_digest": plan.digest,
    }


def _expect(signed: Receipt | RunStatement | AuditStatement, expected: Mapping[str, Any], where: str) -> None:
    """The fields that are known from elsewhere first, since they can be named; then the signature over all of them."""
    for field, value in expected.items():
        found = getattr(signed, field)
        if not _same(found, value):
            raise InputError(f"{where}.{field} is {found!r}, expected {value!r}: it was edited, or is of another run")
    if not signed.holds():
        raise InputError(f"{where}.signature doesn't hold: one of the fields of {where} was edited")


def _compare(claimed: Any, again: Any, path: str, origin: str) -> None:
    """Part by part, never by dotted names: a key may itself hold a dot."""
    if isinstance(again, Mapping) and isinstance(claimed, Mapping):
        for key in sorted({*claimed, *again}):
            inside = f"{path}.{key}" if path else key
            if key not in again:
                raise InputError(f"{origin}: {inside}: no such field; the certificate was edited")
            if key not in claimed:
                raise InputError(f"{origin}: {inside}: missing; the certificate was edited")
            _compare(claimed[key], again[key], inside, origin)
    elif isinstance(again, list) and isinstance(claimed, list) and len(again) == len(claimed):
        for number, (found, expected) in enumerate(zip(claimed, again, strict=True)):
            _compare(found, expected, f"{path}.{number}", origin)
    elif not _same(claimed, again):
        raise InputError(f"{origin}: {path} is {claimed!r}, its replay gives {again!r}; do not trust it")


def _same(found: Any, expected: Any) -> bool:
    if isinstance(found, float) or isinstance(expected, float):
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (found, expected))
        return numbers and math.isclose(found, expected, rel_tol=_TOLERANCE)
    return type(found) is type(expected) and bool(found == expected)


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: {type(value).__name__}, expected an object; the certificate was edited")
    return value
