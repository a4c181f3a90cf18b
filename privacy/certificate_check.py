"""Checks a certificate offline: makes it again from its plan and signed parts, and looks for it in a silo's ledger."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from configs.errors import InputError
from configs.load import parse
from privacy.certificate import CERTIFICATE_VERSION, NOT_AUDITED, certificate
from privacy.chain import find
from privacy.plan import PlanRequest
from privacy.statements import Receipt, RunStatement

_TOLERANCE = 1e-6  # accountants differ by less between machines


def check_certificate(document: Mapping[str, Any], origin: str) -> None:
    """Replays all that a certificate claims.

    Args:
        document: its JSON.
        origin: file name, for the message.

    Raises:
        InputError: a field is missing or is not what the plan and the silos' signatures give; the message names it.
    """
    if document.get("version") != CERTIFICATE_VERSION:
        raise InputError(f"{origin}: version is {document.get('version')!r}, expected {CERTIFICATE_VERSION}")
    for name in ("run_id", "plan", "silos", "audited", "versions"):
        if name not in document:
            raise InputError(f"{origin}: {name}: missing; the certificate was edited")
    plan = parse(PlanRequest, document["plan"], f"{origin}: plan")
    if document.get("plan_digest") != plan.digest:
        raise InputError(f"{origin}: plan_digest is {document.get('plan_digest')!r}, plan's is {plan.digest!r}: edited")
    run, silos = document["run_id"], _mapping(document["silos"], f"{origin}: silos")
    epsilon = plan.epsilon
    for name, silo in silos.items():
        where = f"{origin}: silos.{name}"
        _check_receipt(_mapping(silo, where), name, run, plan, epsilon, where)
        if "statement" in silo:
            _check_statement(silo, name, run, plan, epsilon, where)
    audited = document["audited"]
    if audited != NOT_AUDITED:
        _check_audit(_mapping(audited, f"{origin}: audited"), epsilon, origin)
    versions = _mapping(document["versions"], f"{origin}: versions")
    again = certificate(run, plan, silos, audited=audited, versions=versions)
    _compare(dict(_leaves(document)), dict(_leaves(again)), origin)


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
    name = next((name for name, silo in document["silos"].items() if silo["public_key"] == key), None)
    if name is None:
        raise InputError(f"{origin}: silos: none has the ledger's key {key[:16]}…; give the ledger of one of them")
    silo, run, where = document["silos"][name], document["run_id"], f"{origin}: silos.{name}"
    for part in ("receipt", "statement"):
        if part in silo and hashes[silo[part]["number"] - 1 : silo[part]["number"]] != [silo[part]["head"]]:
            raise InputError(f"{where}.{part}.head: not in the ledger's chain; give this silo's whole, newest ledger")
    reservation = find(bodies, "reserve", run=run)
    found = {
        "plan_digest": reservation["plan_digest"] if reservation else None,
        "public_record_count": reservation["public_record_count"] if reservation else None,
        "rounds_charged": sum(body["kind"] == "charge" and body["run"] == run for body in bodies),
        "number": (find(bodies, "close", run=run) or {"number": None})["number"],
    }
    if reservation is None:
        raise InputError(f"{where}: the ledger holds no reservation of run {run}")
    for field, value in found.items():
        if "statement" in silo and silo["statement"][field] != value:
            raise InputError(f"{where}.statement.{field} is {silo['statement'][field]!r}, the ledger has {value!r}")
    return str(name)


def _check_receipt(silo: Mapping[str, Any], name: str, run: str, plan: PlanRequest, epsilon: float, where: str) -> None:
    receipt = parse(Receipt, silo.get("receipt", {}), f"{where}.receipt")
    expected = {
        "silo": name,
        "dataset": silo.get("dataset_id"),
        "public_key": silo.get("public_key"),
        "public_record_count": silo.get("public_record_count"),
        "run": run,
        "plan_digest": plan.digest,
        "epsilon_reserved": epsilon,
        "delta_reserved": plan.delta,
    }
    _expect(receipt, expected, f"{where}.receipt")


def _check_statement(
    silo: Mapping[str, Any], name: str, run: str, plan: PlanRequest, epsilon: float, where: str
) -> None:
    statement = parse(RunStatement, silo["statement"], f"{where}.statement")
    expected = {
        "silo": name,
        "dataset": silo.get("dataset_id"),
        "public_key": silo.get("public_key"),
        "public_record_count": silo.get("public_record_count"),
        "run": run,
        "plan_digest": plan.digest,
        "epsilon": epsilon,
        "delta": plan.delta,
    }
    _expect(statement, expected, f"{where}.statement")
    if statement.rounds_charged > plan.rounds:
        raise InputError(f"{where}.statement.rounds_charged is {statement.rounds_charged}, the plan has {plan.rounds}")


def _expect(signed: Receipt | RunStatement, expected: Mapping[str, Any], where: str) -> None:
    """The fields that are known from elsewhere first, since they can be named; then the signature over all of them."""
    for field, value in expected.items():
        found = getattr(signed, field)
        if not _same(found, value):
            raise InputError(f"{where}.{field} is {found!r}, expected {value!r}: it was edited, or is of another run")
    if not signed.holds():
        raise InputError(f"{where}.signature doesn't hold: one of the fields of {where} was edited")


def _check_audit(audited: Mapping[str, Any], epsilon: float, origin: str) -> None:
    bound = audited.get("epsilon_lower_bound")
    if not isinstance(bound, int | float) or not 0 <= bound <= epsilon:
        raise InputError(f"{origin}: audited.epsilon_lower_bound is {bound!r}, expected a number up to {epsilon}")


def _compare(claimed: Mapping[str, Any], again: Mapping[str, Any], origin: str) -> None:
    for field in sorted({*claimed, *again}):
        if field not in again:
            raise InputError(f"{origin}: {field}: no such field; the certificate was edited")
        if field not in claimed:
            raise InputError(f"{origin}: {field}: missing; the certificate was edited")
        if not _same(claimed[field], again[field]):
            raise InputError(
                f"{origin}: {field} is {claimed[field]!r}, its replay gives {again[field]!r}; do not trust it"
            )


def _same(found: Any, expected: Any) -> bool:
    if isinstance(found, float) or isinstance(expected, float):
        numbers = isinstance(found, int | float) and isinstance(expected, int | float)
        return numbers and math.isclose(found, expected, rel_tol=_TOLERANCE)
    return type(found) is type(expected) and bool(found == expected)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every scalar of a document under its dotted name; an empty part under its own."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    parts = list(items or ())
    if not parts:
        yield path, value
    for key, item in parts:
        yield from _leaves(item, f"{path}.{key}" if path else str(key))


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: {type(value).__name__}, expected an object; the certificate was edited")
    return value
