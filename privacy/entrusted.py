"""What a silo's ledger says of a run with clients as units: that updates left it without noise of its own.

Such a run spends nothing of the silo's budget, which is about records, and gives no guarantee against the aggregator,
who sees the updates. So that the steward can see it afterwards, the silo signs, beside what it spends: ``entrust``, the
plan that it took part in, and ``unnoised``, one for each update, before the first byte of it is sent.
"""

from typing import Any

from privacy.chain import find
from privacy.journal import Journal, refusal
from privacy.plan import PlanRequest

ENTRUST, UNNOISED = "entrust", "unnoised"
_NOISE = "none: the aggregator adds it"  # short enough for `ledger show` to print it whole


def entrust(journal: Journal, run_id: str, plan: PlanRequest, aggregator: str) -> None:
    """Records that a run may ask for updates without noise. The same run and plan again change nothing.

    Args:
        journal: the silo's.
        run_id: the run.
        plan: with clients as units.
        aggregator: the public key of whoever gets the updates.

    Raises:
        PolicyRefusal: the run reserved another plan, or has another aggregator.
    """
    with journal.transaction():
        bodies = journal.bodies()
        before = find(bodies, ENTRUST, run=run_id) or find(bodies, "reserve", run=run_id)
        if before is None:
            journal.append(
                ENTRUST,
                run=run_id,
                plan=plan.model_dump(),
                plan_digest=plan.digest,
                aggregator=aggregator,
                noise=_NOISE,
            )
        elif (before["plan_digest"], before.get("aggregator")) != (plan.digest, aggregator):
            raise refusal("reservation", plan.digest, before["plan_digest"], f"run {run_id} has another plan")


def entrusted(journal: Journal, run_id: str) -> dict[str, Any] | None:
    """The entry with which a run was entrusted."""
    return find(journal.bodies(), ENTRUST, run=run_id)


def record_update(journal: Journal, run_id: str, request_id: str, request_digest: str, round_number: int) -> None:
    """Records an update that is about to leave without noise; the same request again is the same update.

    Raises:
        PolicyRefusal: the run is not entrusted, or closed; the id or the round was another request's; or there is no
            such round in the plan.
    """
    with journal.transaction():
        bodies = journal.bodies()
        run = find(bodies, ENTRUST, run=run_id)
        if run is None:
            raise refusal("reservation", run_id, "an entrusted run", f"run {run_id} was not entrusted with updates")
        if find(bodies, "close", run=run_id) is not None:
            raise refusal("closed", run_id, "an open run", f"run {run_id} is closed")
        before = find(bodies, UNNOISED, run=run_id, request=request_id)
        if before is not None:
            if (before["digest"], before["round"]) != (request_digest, round_number):
                raise refusal("request_id", request_digest, before["digest"], f"request {request_id} was another one")
            return
        most = run["plan"]["rounds"]
        if not 1 <= round_number <= most:
            raise refusal("schedule", f"round {round_number}", f"1 to {most}", f"run {run_id} has {most} rounds")
        if find(bodies, UNNOISED, run=run_id, round=round_number) is not None:
            raise refusal("schedule", f"round {round_number}", "a new one", f"its update of run {run_id} has left")
        journal.append(
            UNNOISED, run=run_id, request=request_id, digest=request_digest, round=round_number, noise=_NOISE
        )
