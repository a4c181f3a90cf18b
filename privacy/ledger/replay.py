"""Replays what a ledger claims: each reservation's epsilon from its plan, and that every charge was covered."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from configs.errors import InputError, PolicyRefusal
from configs.parse import parse
from privacy.ledger.chain import left, releases
from privacy.ledger.runs import Runs, coordinator_of
from privacy.plan import PlanTerms, PrivacyPlan

_TOLERANCE = 1e-6
Body = dict[str, Any]


def replay(bodies: list[Body], origin: str) -> None:
    """Computes every claim again.

    Args:
        bodies: the verified entries, oldest first.
        origin: file name, for the message.

    Raises:
        InputError: the first entry that the silo would not have written: a reservation that claims less than its plan
            spends, repeats a run, or takes more than was left; a charge or a release that nothing covers; and others.
    """
    state = _State()
    for position, body in enumerate(bodies, 1):
        where = f"{origin}: entry {position}"
        kind = body.get("kind")
        rule = _RULES.get(kind) if isinstance(kind, str) else None
        if rule is None:
            raise InputError(f"{where}: kind {kind!r} is not known; do not trust this ledger")
        try:
            problem = rule(state, body)
            if body["kind"] == "reserve" and not problem:
                problem = _overspent(bodies[:position])
            if body["kind"] != "entrust" and body.keys() & {"study_epsilon", "study_delta"}:
                problem = "counts something else for its study than it spends"
        except (InputError, PolicyRefusal) as error:
            problem = str(error)
        except (LookupError, TypeError, ValueError, ArithmeticError):
            problem = "a field is missing or of another type"
        if problem:
            raise InputError(f"{where}: {problem}; do not trust this ledger")


@dataclass
class _State:
    """What has happened up to an entry."""

    plans: dict[int, PlanTerms] = field(default_factory=dict)  # by the number of the entry that opened the run
    charged: dict[int, set[tuple[str, int]]] = field(default_factory=dict)  # of open runs: metric or "", number
    unanswered: dict[int, tuple[int, str]] = field(default_factory=dict)  # charge -> run, and its name
    entrusted: dict[int, PlanTerms] = field(default_factory=dict)
    unnoised: dict[int, set[int]] = field(default_factory=dict)  # of open runs: rounds
    runs: Runs = field(default_factory=Runs)
    opened: bool = False

    def repeats(self, body: Body) -> bool:
        """Whether the run that an entry opens is there already."""
        return self.runs.of(body["run"], coordinator_of(body)) is not None

    def open(self, body: Body) -> int:
        """Takes in a run; returns its number."""
        self.runs.add(body)
        return int(body["number"])

    def number(self, body: Body) -> int:
        """The number of the run that an entry draws on; 0 where there is none."""
        run = self.runs.add(body)
        return 0 if run is None else int(run.opening["number"])


def _opening(state: _State, _body: Body) -> str:
    repeated, state.opened = state.opened, True
    return "opens the ledger a second time" if repeated else ""


def _policy(_state: _State, body: Body) -> str:
    allowed = all(math.isfinite(body[name]) and body[name] >= 0 for name in ("epsilon", "delta"))
    return "" if allowed else f"a budget of {body['epsilon']} and {body['delta']}"


def _reserve(state: _State, body: Body) -> str:
    run, plan = body["run"], parse(PlanTerms, body["plan"], "plan")
    if state.repeats(body):
        return f"run {run} is reserved a second time"
    if any(plan.unit != other.unit for other in state.plans.values()):
        return f"a reservation of unit {plan.unit!r} in a ledger of another unit"
    try:
        if _bound(plan, body["public_record_count"]).public_record_count != body["public_record_count"]:
            return f"its public_record_count is {body['public_record_count']}, its plan has {plan.num_clients} clients"
    except PolicyRefusal as refusal:
        return f"its plan does not fit its public_record_count ({refusal})"
    epsilon = plan.epsilon
    claimed = (body["plan_digest"], body["delta"])
    if claimed != (plan.digest, plan.delta) or abs(epsilon - body["epsilon"]) > _TOLERANCE * epsilon:
        return f"claims epsilon {body['epsilon']}, its plan spends {epsilon}"
    number = state.open(body)
    state.plans[number], state.charged[number] = plan, set()
    return ""


def _bound(plan: PlanTerms, public_record_count: int) -> PrivacyPlan:
    return plan.bind(public_record_count) if plan.unit == "record" else plan.for_clients()


def _overspent(bodies: list[Body]) -> str:
    """Only a new reservation has to fit: a policy may be lowered, and a reconciliation may charge more than is left."""
    remaining = left(bodies)
    if remaining.epsilon < -_TOLERANCE * bodies[-1]["epsilon"] or remaining.delta < -_TOLERANCE * bodies[-1]["delta"]:
        return f"reserves more than was left: epsilon {remaining.epsilon:.4g} and delta {remaining.delta:.3g} after it"
    return ""


def _charge(state: _State, body: Body) -> str:
    metric, run = body.get("metric", ""), state.number(body)
    number = body["metric_number"] if metric else body["round"]
    if run not in state.charged or (metric, number) in state.charged[run]:
        return "a charge that no reservation covers"
    if not 1 <= number <= releases(state.plans[run].model_dump(), metric):
        return "a charge that no reservation covers"
    state.charged[run].add((metric, number))
    state.unanswered[body["number"]] = run, body["run"]
    return ""


def _release(state: _State, body: Body) -> str:
    if state.unanswered.pop(body["charge"], (0, ""))[1] != body["run"]:
        return f"a release of charge {body['charge']}, which is not there, answered, or closed"
    return ""


def _close(state: _State, body: Body) -> str:
    run = state.number(body)
    state.unanswered = {charge: owner for charge, owner in state.unanswered.items() if owner[0] != run}
    known = state.charged.pop(run, None) is not None or state.unnoised.pop(run, None) is not None
    return "" if known else f"closes run {body['run']}, which is not open"


def _entrust(state: _State, body: Body) -> str:
    """An update without noise spends nothing that could be added up; what is checked is that it was told truly."""
    run, plan = body["run"], parse(PlanTerms, body["plan"], "plan")
    if state.repeats(body):
        return f"run {run} is entrusted a second time"
    if plan.unit != "client" or body["plan_digest"] != plan.digest:
        return "is entrusted with another plan than it says, or with one about records"
    if "study" in body:
        claimed = (body["study_epsilon"], body["study_delta"])
        if not all(
            math.isclose(*pair, rel_tol=_TOLERANCE) for pair in zip(claimed, (plan.epsilon, plan.delta), strict=True)
        ):
            return f"counts epsilon {claimed[0]} for its study, its plan claims {plan.epsilon}"
    number = state.open(body)
    state.entrusted[number], state.unnoised[number] = plan, set()
    return ""


def _unnoised(state: _State, body: Body) -> str:
    run, number = state.number(body), body["round"]
    if run not in state.unnoised or number in state.unnoised[run] or not 1 <= number <= state.entrusted[run].rounds:
        return "an update without noise of a run that was not entrusted with it"
    state.unnoised[run].add(number)
    return ""


def _reconcile(_state: _State, body: Body) -> str:
    for name in ("epsilon", "delta"):
        taken = sum(spend[name] for spend in body["spends"])
        if not math.isclose(body[name], taken, rel_tol=_TOLERANCE) or any(s[name] < 0 for s in body["spends"]):
            return f"charges {name} {body[name]}, its spends are {taken} together"
    return ""


_RULES: dict[str, Callable[[_State, Body], str]] = {
    "open": _opening,
    "policy": _policy,
    "reserve": _reserve,
    "charge": _charge,
    "release": _release,
    "close": _close,
    "entrust": _entrust,
    "unnoised": _unnoised,
    "reconcile": _reconcile,
}
