"""Replays what a ledger claims: each reservation's epsilon from its plan, and that every charge was covered."""

import math
from typing import Any

from configs.errors import InputError
from configs.load import parse
from privacy.plan import PlanRequest

_TOLERANCE = 1e-6


def replay(bodies: list[dict[str, Any]], origin: str) -> None:
    """Computes every claim again.

    Args:
        bodies: the verified entries, oldest first.
        origin: file name, for the message.

    Raises:
        InputError: a reservation claims less than its plan spends, or a charge had none.
    """
    open_runs: dict[str, set[int]] = {}
    plans: dict[str, PlanRequest] = {}
    for body in bodies:
        where = f"{origin}: entry {body['number']}"
        if body["kind"] == "reserve":
            plan = parse(PlanRequest, body["plan"], where)
            epsilon = plan.epsilon
            claimed = (body["plan_digest"], body["delta"])
            if claimed != (plan.digest, plan.delta) or abs(epsilon - body["epsilon"]) > _TOLERANCE * epsilon:
                raise InputError(
                    f"{where}: claims epsilon {body['epsilon']}, its plan spends {epsilon}; do not trust it"
                )
            plans[body["run"]], open_runs[body["run"]] = plan, set()
        elif body["kind"] == "charge":
            covered = body["run"] in open_runs and 1 <= body["round"] <= plans[body["run"]].rounds
            if not covered or body["round"] in open_runs[body["run"]]:
                raise InputError(f"{where}: a charge that no reservation covers; do not trust this ledger")
            open_runs[body["run"]].add(body["round"])
        elif body["kind"] == "reconcile":
            for name in ("epsilon", "delta"):
                taken = sum(spend[name] for spend in body["spends"])
                if not math.isclose(body[name], taken, rel_tol=_TOLERANCE) or any(s[name] < 0 for s in body["spends"]):
                    raise InputError(
                        f"{where}: charges {name} {body[name]}, its spends are {taken} together; do not trust it"
                    )
        elif body["kind"] == "close":
            open_runs.pop(body["run"], None)
