"""Checks a certificate offline: makes it again from its plan and signed parts, and looks for it in a silo's ledger."""

from collections.abc import Mapping
from typing import Any

from configs.errors import InputError, PolicyRefusal
from configs.parse import parse
from privacy.accounting.size import check_size
from privacy.certificate.certificate import (
    AGGREGATOR,
    CERTIFICATE_VERSION,
    FIRST_WITH_MANDATES_OF_CLIENTS,
    FIRST_WITH_MODEL,
    FIRST_WITH_SHARED_NOISE,
    NOT_AUDITED,
    READABLE,
    certificate,
    ledgers_of,
)
from privacy.certificate.model_digests import ModelDigests
from privacy.certificate.signed_parts import (
    TOLERANCE,
    check_closing,
    check_mandate,
    check_mandated,
    check_receipt,
    check_statement,
    expect,
    in_both,
    same,
)
from privacy.ledger.runs import Run, Runs
from privacy.ledger.statements import AuditStatement, Receipt, RunStatement
from privacy.plan import PlanTerms

_SILO_FIELDS = {"dataset_id", "public_key", "public_record_count", "receipt", "statement", "audit", "mandate"}
_MANDATE_FIELDS = {"dataset_id", "public_key", "mandate", "receipt"}


def check_certificate(document: Mapping[str, Any], origin: str) -> None:
    """Replays all that a certificate claims.

    Args:
        document: its JSON.
        origin: file name, for the message.

    Raises:
        InputError: a field is missing or is not what the plan and the silos' signatures give; the message names it. Or
            an audit's lower bound at 99.9% confidence is above epsilon.
    """
    form = document.get("version")
    if type(form) is not int or form not in READABLE:
        raise InputError(
            f"{origin}: version is {form!r}, this Siloweave reads {READABLE[0]} to {CERTIFICATE_VERSION}; a newer one "
            "needs a newer Siloweave"
        )
    for name in ("run_id", "plan", "versions"):
        if name not in document:
            raise InputError(f"{origin}: {name}: missing; the certificate was edited")
    plan = _accountable(parse(PlanTerms, document["plan"], f"{origin}: plan"), form, origin)
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
    model = _model(document, signed, plan, f"{origin}: model") if form >= FIRST_WITH_MODEL else None
    mandated = _mandated(document, signed, plan, form, origin)
    again = certificate(run, plan, signed, model, mandated=mandated, versions=versions, form=form)
    _compare(document, again, "", origin)
    if again["audited"] != NOT_AUDITED and (bound := again["audited"]["epsilon_lower_bound_99_9"]) > plan.epsilon:
        raise InputError(f"{origin}: audited: epsilon is at least {bound:.4g} (99.9% confidence): its claim is false")


def _accountable(plan: PlanTerms, form: int, origin: str) -> PlanTerms:
    """Refuses a stranger's plan that is too large to account for, or of which its version has nothing to say."""
    if plan.noise is not None and form < FIRST_WITH_SHARED_NOISE:
        raise InputError(
            f"{origin}: version is {form}, and silos make noise together since {FIRST_WITH_SHARED_NOISE}: edited"
        )
    try:
        check_size(plan.schedule)
    except PolicyRefusal as refusal:
        raise InputError(f"{origin}: plan: {refusal}") from None
    return plan


def _model(
    document: Mapping[str, Any], ledgers: Mapping[str, Mapping[str, Any]], plan: PlanTerms, where: str
) -> ModelDigests | None:
    """What the document says of its model. Every ledger whose release went into it must be in the certificate."""
    found = document.get("model")
    if found is None and any("audit" in ledger for ledger in ledgers.values()):
        return None  # an audit publishes none
    model = parse(ModelDigests, dict(_mapping(found, where)), where)
    if len(model.rounds) != plan.rounds:
        raise InputError(f"{where}.rounds: {len(model.rounds)}, the plan has {plan.rounds}")
    _check_sums(model, plan, ledgers, where)
    for name in sorted(model.contributors()):
        if name not in ledgers:
            raise InputError(f"{where}: has a release of {name!r}, which the certificate leaves out; do not trust it")
        charged, released = ledgers[name].get("statement", {}).get("rounds_charged"), len(model.rounds_of(name))
        if charged is not None and released > charged:
            raise InputError(f"{where}: has {released} releases of {name!r}, which states {charged} charged rounds")
    return model


def _check_sums(model: ModelDigests, plan: PlanTerms, ledgers: Mapping[str, Any], where: str) -> None:
    """A round that was added up under masks is of as many silos as the plan says, or was lost."""
    if plan.secure_sum is None:
        return
    if plan.noise is not None and len(ledgers) < plan.secure_sum.fewest:
        raise InputError(
            f"{where}: {len(ledgers)} silos, and each sum had the noise of {plan.secure_sum.fewest} or more; do not "
            "trust it"
        )
    fewest = 1 if plan.unit == "client" else plan.secure_sum.fewest  # the aggregator's, who alone knows of whom
    for number, one in enumerate(model.rounds, 1):
        summed = len(one.counts)
        if one.updates or 0 < summed < fewest:
            raise InputError(
                f"{where}.rounds.{number - 1}: {summed} releases, and with secure aggregation there are none or at "
                f"least {fewest}; do not trust it"
            )


def _mandated(
    document: Mapping[str, Any], ledgers: Mapping[str, Mapping[str, Any]], plan: PlanTerms, form: int, origin: str
) -> dict[str, dict[str, Any]]:
    """The mandates of the silos of a run with clients as units, whose noise and ledger are the aggregator's."""
    if "mandates" not in document or plan.unit != "client" or form < FIRST_WITH_MANDATES_OF_CLIENTS:
        return {}
    found = _mapping(document["mandates"], f"{origin}: mandates")
    for name, value in found.items():
        where = f"{origin}: mandates.{name}"
        part = _mapping(value, where)
        for field in sorted(part.keys() ^ _MANDATE_FIELDS):
            raise InputError(f"{where}.{field}: {'no such field' if field in part else 'missing'}; edited")
        receipt = parse(Receipt, part["receipt"], f"{where}.receipt")
        check_mandated(part, receipt, name, document["run_id"], plan, ledgers[AGGREGATOR]["public_key"], where)
    return {name: dict(value) for name, value in found.items()}


def _where(origin: str, unit: str, name: str) -> str:
    return f"{origin}: {name}" if unit == "client" else f"{origin}: silos.{name}"


def _signed(value: Any, name: str, run: str, plan: PlanTerms, where: str) -> dict[str, Any]:
    """A ledger's part as its signatures give it; whatever else was written there is then found by comparing."""
    silo = dict(_mapping(value, where))
    for field in sorted(silo.keys() - _SILO_FIELDS):
        raise InputError(f"{where}.{field}: no such field, and nothing signs it; the certificate was edited")
    receipt = parse(Receipt, silo.get("receipt", {}), f"{where}.receipt")
    mandate = check_mandate(silo, name, plan, receipt.epsilon_reserved, f"{where}.mandate")
    check_receipt(receipt, silo, name, run, plan, f"{where}.receipt")
    found = {**silo, "receipt": receipt.model_dump(mode="json"), **({"mandate": mandate} if mandate else {})}
    if "statement" in silo:
        statement = parse(RunStatement, silo["statement"], f"{where}.statement")
        check_statement(statement, silo, name, run, plan, f"{where}.statement")
        check_closing(statement, receipt, f"{where}.statement")
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
            charges are not what the silo stated, or its releases not those of the model.
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
    for field, value in _facts(found).items():
        if "statement" in silo and silo["statement"].get(field, "") != value:
            raise InputError(f"{where}.statement.{field} is {silo['statement'].get(field)!r}, the ledger has {value!r}")
    if document.get("model") is not None:
        _check_releases(ModelDigests.model_validate(document["model"]), str(name), bodies, found, origin)
    return str(name)


def _in_chain(bodies: list[dict[str, Any]], name: str, signed: Mapping[str, Any]) -> Run | None:
    """The run that was signed for: of those with its name, the one that ended where it says."""
    runs = [run for run in Runs(bodies) if run.name == name and run.opening["kind"] == "reserve"]
    alike = [sum(_facts(run)[name] == signed[name] for name in ("number", "plan_digest")) for run in runs]
    return runs[alike.index(max(alike))] if runs else None


def _facts(run: Run) -> dict[str, Any]:
    """What a ledger says of a run, under the names of a statement."""
    return {
        "plan_digest": run.opening["plan_digest"],
        "public_record_count": run.opening["public_record_count"],
        "rounds_charged": run.rounds_charged,
        "number": run.closing["number"] if run.closing else None,
        "mandate": run.opening.get("mandate", ""),
    }


def _check_releases(model: ModelDigests, name: str, bodies: list[dict[str, Any]], run: Run, origin: str) -> None:
    """Checks that the ledger released what went into the model. It may have released more, too late for its round."""
    replies = {body["charge"]: body["reply_digest"] for body in bodies if body["kind"] == "release"}
    for number, digest in model.rounds_of(name).items():
        released = [
            replies[body["number"]] for body in run.charges if body["round"] == number and body["number"] in replies
        ]
        if digest not in released:
            raise InputError(
                f"{origin}: model.rounds: the release of {name} in round {number} is {digest[:16]}…, the ledger has "
                f"{', '.join(released) or 'none'}"
            )


def _check_audit(silo: Mapping[str, Any], name: str, run: str, plan: PlanTerms, where: str) -> AuditStatement:
    audit = parse(AuditStatement, silo["audit"], where)
    expected = in_both(silo, name, run, plan)
    del expected["public_record_count"], expected["mandate"]
    expect(audit, expected, where)
    if "statement" not in silo:
        raise InputError(f"{where}: is of a run that is not closed; the certificate was edited")
    if sum(score.share for score in audit.scores) > 1 + TOLERANCE:
        raise InputError(f"{where}.scores: their shares of the allowed error add up to more than 1; do not trust it")
    for score in audit.scores:
        if not score.correct <= score.guesses <= score.canaries:
            raise InputError(f"{where}.scores: {score.mode}: counts that don't fit together; do not trust it")
    return audit


def _compare(claimed: Any, again: Any, path: str, origin: str) -> None:
    """Compares part by part, never by dotted names: a key may itself hold a dot."""
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
    elif not same(claimed, again):
        raise InputError(f"{origin}: {path} is {claimed!r}, its replay gives {again!r}; do not trust it")


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: {type(value).__name__}, expected an object; the certificate was edited")
    return value
