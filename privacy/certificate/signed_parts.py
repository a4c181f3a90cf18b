"""What a run's receipts and statements have to say: the same when they come and when a certificate is checked."""

import math
from collections.abc import Mapping
from typing import Any

from configs.errors import InputError
from configs.storage.files import digest_json
from privacy.ledger.statements import AuditStatement, Receipt, RunStatement
from privacy.mandate import mandate_of, require_owner
from privacy.plan import PlanTerms

TOLERANCE = 1e-6  # accountants differ by less between machines


def in_both(silo: Mapping[str, Any], name: str, run: str, plan: PlanTerms) -> dict[str, Any]:
    """What a receipt and a statement of the same run both say.

    Args:
        silo: what the ledger's owner has told of itself: ``dataset_id``, ``public_key``, ``public_record_count``.
        name: the ledger's.
        run: the run.
        plan: the plan that was reserved.
    """
    return {
        "silo": name,
        "dataset": silo.get("dataset_id"),
        "public_key": silo.get("public_key"),
        "public_record_count": silo.get("public_record_count"),
        "run": run,
        "plan_digest": plan.digest,
        "mandate": digest_json(silo["mandate"]) if "mandate" in silo else "",
    }


def check_mandate(
    silo: Mapping[str, Any], name: str, plan: PlanTerms, epsilon: float, where: str
) -> dict[str, Any] | None:
    """Checks the mandate of a run, whose digest its receipt and statement have to name.

    Args:
        silo: as in ``in_both``; its ``mandate``, where there is one.
        name: the ledger's.
        plan: the plan that was reserved.
        epsilon: what that spends.
        where: what is checked, for the message.

    Returns:
        The mandate as its signature gives it.

    Raises:
        InputError: it was edited, is another silo's, or does not cover the plan.
    """
    if "mandate" not in silo:
        return None
    mandate = mandate_of(silo["mandate"], where)
    require_owner(mandate, name, str(silo.get("dataset_id")), str(silo.get("public_key")), where)
    if found := mandate.beyond(plan, epsilon):
        raise InputError(f"{where}.terms.{found[0]}: the plan has {found[1]}, allowed {found[2]}; do not trust it")
    return mandate.model_dump(mode="json")


def check_mandated(
    part: Mapping[str, Any], receipt: Receipt, name: str, run: str, plan: PlanTerms, aggregator: str, where: str
) -> None:
    """Checks what a silo has signed of a run with clients as units: that its mandate covers the plan.

    Args:
        part: ``dataset_id``, ``public_key`` and ``mandate`` of the silo.
        receipt: its receipt.
        name: the silo's.
        run: the run.
        plan: the run's.
        aggregator: public key of who has asked.
        where: what is checked, for the message.

    Raises:
        InputError: the mandate was edited, is another silo's or for another coordinator, or does not cover the plan; or
            the receipt is not of this run under this mandate, or says that the silo's own budget was spent.
    """
    mandate = check_mandate(part, name, plan, plan.epsilon, f"{where}.mandate")
    if mandate is None:
        raise InputError(f"{where}.mandate: missing; only a silo with a mandate stands here")
    if (found := mandate["terms"]["coordinator"]) != aggregator:
        raise InputError(f"{where}.mandate.terms.coordinator is {found!r}, and the run is {aggregator!r}'s")
    check_entrusted(receipt, part, name, run, plan, f"{where}.receipt")


def check_entrusted(
    receipt: Receipt, silo: Mapping[str, Any], name: str, run: str, plan: PlanTerms, where: str
) -> None:
    """Checks the receipt of a silo whose updates leave without noise: such a run spends nothing of its own budget.

    Raises:
        InputError: a field is not as expected, or the signature doesn't hold.
    """
    nothing = {"public_record_count": 0, "epsilon_reserved": 0.0, "delta_reserved": 0.0}
    unnamed = {} if "mandate" in silo else {"plan_digest": ""}
    expect(receipt, {**in_both(silo, name, run, plan), **nothing, **unnamed}, where)


def check_receipt(receipt: Receipt, silo: Mapping[str, Any], name: str, run: str, plan: PlanTerms, where: str) -> None:
    """Checks every field of a receipt that is known from elsewhere; see ``in_both``.

    Raises:
        InputError: a field is not as expected, it doesn't count the run among its spends, or the signature doesn't
            hold.
    """
    spent = {"epsilon_reserved": plan.epsilon, "delta_reserved": plan.delta}
    expect(receipt, {**in_both(silo, name, run, plan), **spent}, where)
    epsilon, delta = receipt.epsilon_reserved, receipt.delta_reserved
    if not any(same(spend.epsilon, epsilon) and same(spend.delta, delta) for spend in receipt.spends):
        raise InputError(f"{where}.spends: none is epsilon {epsilon:.6g}, delta {delta:g}, which the run has reserved")


def check_statement(
    statement: RunStatement, silo: Mapping[str, Any], name: str, run: str, plan: PlanTerms, where: str
) -> None:
    """Checks every field of a statement that is known from elsewhere; see ``in_both``.

    Raises:
        InputError: a field is not as expected, or the signature doesn't hold.
    """
    spent = {"epsilon": plan.epsilon, "delta": plan.delta}
    expect(statement, {**in_both(silo, name, run, plan), **spent}, where)
    if statement.rounds_charged > plan.rounds:
        raise InputError(f"{where}.rounds_charged is {statement.rounds_charged}, the plan has {plan.rounds}")


def check_history(held: Receipt, receipt: Receipt, where: str) -> None:
    """Whether two receipts of one run can be of the same ledger, whichever is newer.

    Raises:
        InputError: they tell of two entries in one place, or the newer one has forgotten a spend.
    """
    older, newer = sorted((held, receipt), key=position)
    if position(older) == position(newer) and older != newer:
        raise InputError(f"{where}.head: another receipt of entry {receipt.number} differs from it")
    if not set(older.spends) <= set(newer.spends):
        raise InputError(f"{where}.spends: one of an older receipt is missing in the newer one")


def check_closing(statement: RunStatement, receipt: Receipt, where: str) -> None:
    """Whether a statement tells of an entry that its run's newest receipt covers.

    Raises:
        InputError: its entry comes after the receipt's, or is another one in the same place.
    """
    if statement.number > receipt.number:
        raise InputError(f"{where}.number is {statement.number}, the newest receipt is of entry {receipt.number}")
    if statement.number == receipt.number and statement.head != receipt.head:
        raise InputError(f"{where}.head is another than the receipt's of the same entry {receipt.number}")


def position(receipt: Receipt) -> tuple[int, int]:
    """Where in its ledger's life a receipt was made."""
    return receipt.epoch, receipt.number


def expect(signed: Receipt | RunStatement | AuditStatement, expected: Mapping[str, Any], where: str) -> None:
    """Checks the fields that are known from elsewhere first, since they can be named; then the signature over all."""
    for field, value in expected.items():
        found = getattr(signed, field)
        if not same(found, value):
            raise InputError(f"{where}.{field} is {found!r}, expected {value!r}: it was edited, or is of another run")
    if not signed.holds():
        raise InputError(f"{where}.signature doesn't hold: one of the fields of {where} was edited")


def same(found: Any, expected: Any) -> bool:
    """Equal values of one type; numbers with a fraction as far as accountants agree."""
    if isinstance(found, float) or isinstance(expected, float):
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (found, expected))
        return numbers and math.isclose(found, expected, rel_tol=TOLERANCE)
    return type(found) is type(expected) and bool(found == expected)
