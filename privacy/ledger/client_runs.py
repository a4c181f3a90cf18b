"""What a silo's ledger says of a run with clients as units: that updates left it without noise of its own.

Such a run spends nothing of the silo's budget, which is about records, and gives no guarantee against the aggregator,
who sees the updates. So that the steward can see it afterwards, the silo signs two more kinds of entries beside those
of what it spends: ``entrust``, with the plan that it took part in, and ``unnoised``, one for each update, before the
first byte of it is sent.
"""

from datetime import UTC, datetime
from typing import Any

from configs.errors import PolicyRefusal
from privacy.ledger.journal import Journal
from privacy.ledger.limits import Limits, Study, check_runs, check_study, under
from privacy.ledger.runs import Run, Runs, named
from privacy.plan import PlanTerms

ENTRUST, UNNOISED = "entrust", "unnoised"
_NOISE = "none: the aggregator adds it"  # short enough for `ledger show` to print it whole


def entrust(journal: Journal, run_id: str, plan: PlanTerms, aggregator: str, limits: Limits) -> None:
    """Records that a run may ask for updates without noise. The same run and plan again change nothing.

    Args:
        journal: the silo's.
        run_id: the run.
        plan: the run's, with clients as units.
        aggregator: the public key of whoever gets the updates, and whose run it is.
        limits: of the policy.

    Raises:
        PolicyRefusal: the run reserved another plan, the aggregator has as many runs as it may, or its study
            has no room, or may have lost what it has used.
    """
    with journal.transaction():
        bodies = journal.bodies()
        before = Runs(bodies).of(run_id, aggregator)
        if before is None:
            check_runs(bodies, aggregator, limits)
            if limits.study is not None:
                _check_nothing_lost(bodies, limits.study)
                check_study(bodies, plan.epsilon, plan.delta, limits.study)
            journal.append(
                ENTRUST,
                run=run_id,
                plan=plan.model_dump(),
                plan_digest=plan.digest,
                aggregator=aggregator,
                noise=_NOISE,
                **_claimed(plan, limits.study),
            )
        elif (before.opening["kind"], before.opening["plan_digest"]) != (ENTRUST, plan.digest):
            reserved = before.opening["plan_digest"]
            raise PolicyRefusal.of("reservation", plan.digest, reserved, f"run {run_id} has another plan")


def _check_nothing_lost(bodies: list[dict[str, Any]], study: Study) -> None:
    """Refuses a mandate from before a reconciliation.

    What runs with clients as units claim is in no receipt, since it is nobody's spend but the study's. So what of it
    was lost with a ledger can't be charged again, and a mandate that may have been used then has no room that anybody
    can tell. One that was there at a reconciliation is named by its entry; times, which a clock may have wrong, are
    for files that were put back later, and for entries of before that name none.

    Raises:
        PolicyRefusal: it is one.
    """
    for body in bodies:
        if body["kind"] == "reconcile" and (study.mandate in body.get("mandates", ()) or study.issued <= body["time"]):
            issued, since = (
                datetime.fromtimestamp(time, tz=UTC).isoformat(" ", "seconds") for time in (study.issued, body["time"])
            )
            raise PolicyRefusal.of(
                "mandate.issued",
                issued,
                f"after {since}",
                f"study {study.name} has a mandate of {issued}, and the silo's ledger was reconciled at {since}: what "
                "its runs claimed before may be lost; ask the silo's steward to revoke it, and to issue a new one",
            )


def _claimed(plan: PlanTerms, study: Study | None) -> dict[str, Any]:
    """What a run counts for in its study: what the aggregator's plan claims. Of the silo's own budget it takes none."""
    return {} if study is None else {**under(study), "study_epsilon": plan.epsilon, "study_delta": plan.delta}


def entrusted(journal: Journal, run_id: str, aggregator: str) -> dict[str, Any] | None:
    """The entry with which an aggregator's run was entrusted."""
    run = _run(journal, run_id, aggregator)
    return None if run is None else run.opening


def _run(journal: Journal, run_id: str, aggregator: str) -> Run | None:
    run = Runs(journal.bodies()).of(run_id, aggregator)
    return run if run is not None and run.opening["kind"] == ENTRUST else None


def record_update(
    journal: Journal, run_id: str, aggregator: str, request_id: str, request_digest: str, round_number: int
) -> bool:
    """Records an update that is about to leave without noise; the same request again is the same update.

    Returns:
        Whether it was not recorded before.

    Raises:
        PolicyRefusal: the run is not entrusted, or closed; the id or the round was another request's; or there is no
            such round in the plan.
    """
    with journal.transaction():
        run = _run(journal, run_id, aggregator)
        if run is None:
            raise PolicyRefusal.of(
                "reservation", run_id, "an entrusted run", f"run {run_id} was not entrusted with updates"
            )
        if run.closing is not None:
            raise PolicyRefusal.of("closed", run_id, "an open run", run.end)
        before = run.charge(request=request_id)
        if before is not None:
            if (before["digest"], before["round"]) != (request_digest, round_number):
                raise PolicyRefusal.of(
                    "request_id", request_digest, before["digest"], f"request {request_id} was another one"
                )
            return False
        most = run.opening["plan"]["rounds"]
        if not 1 <= round_number <= most:
            raise PolicyRefusal.of(
                "schedule", f"round {round_number}", f"1 to {most}", f"run {run_id} has {most} rounds"
            )
        if run.charge(round=round_number) is not None:
            raise PolicyRefusal.of(
                "schedule", f"round {round_number}", "a new one", f"its update of run {run_id} has left"
            )
        journal.append(
            UNNOISED,
            run=run_id,
            **named(aggregator),
            request=request_id,
            digest=request_digest,
            round=round_number,
            noise=_NOISE,
        )
    return True
