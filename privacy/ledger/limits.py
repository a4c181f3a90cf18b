"""What a new run has to fit into: the dataset's budget, a day, a coordinator's share, all by the ledger's entries."""

from dataclasses import dataclass
from typing import Any

from configs.errors import PolicyRefusal
from privacy.ledger.chain import Budget, left, spent_since
from privacy.ledger.journal import Journal
from privacy.ledger.runs import Runs
from privacy.plan import PlanTerms

DAY_S = 24 * 3600
LARGEST_NUMBER_OF_SPENDS = 5000  # about 130 bytes each in a receipt, which may be a megabyte
LARGEST_SHARE = 1000  # of them, for one coordinator


@dataclass(frozen=True)
class Study:
    """What the mandate of a study allows all of its runs together.

    Attributes:
        name: the study's.
        mandate: digest of the mandate in force.
        issued: when the silo signed it, in seconds since 1970.
        epsilon: of all reservations in the study's name, under whichever mandate.
        delta: the same.
    """

    name: str
    mandate: str
    issued: float
    epsilon: float
    delta: float


@dataclass(frozen=True)
class Limits:
    """What the policy in force allows beside the budget; None is no limit.

    Attributes:
        epsilon_per_day: the epsilon of all reservations within 24 hours.
        runs_per_day: the runs that one coordinator opens within 24 hours.
        open_runs: the open runs of one coordinator.
        study: in whose name the run is asked for; None where the silo asks for no mandate.
    """

    epsilon_per_day: float | None = None
    runs_per_day: int | None = None
    open_runs: int | None = None
    study: Study | None = None


def check_new(bodies: list[dict[str, Any]], terms: PlanTerms, epsilon: float, limits: Limits, coordinator: str) -> None:
    """Whether a run that has reserved nothing yet may reserve this plan. Writes nothing.

    Args:
        bodies: the ledger's entries.
        terms: the plan.
        epsilon: what it spends; 0 before it is known.
        limits: of the policy.
        coordinator: who asks.

    Raises:
        PolicyRefusal: the ledger is of another unit, or one of the limits has no room.
    """
    check_unit(bodies, terms.unit)
    check_runs(bodies, coordinator, limits)
    check_spend(bodies, coordinator, epsilon, terms.delta, limits)


def check_runs(bodies: list[dict[str, Any]], coordinator: str, limits: Limits) -> None:
    """Whether a coordinator may open one more run.

    Raises:
        PolicyRefusal: it has opened as many today, or has as many open, as the policy allows it.
    """
    own = [run for run in Runs(bodies) if run.coordinator == coordinator]
    since = Journal.now(_latest(bodies)) - DAY_S
    today, open_now = sum(run.opening["time"] >= since for run in own), sum(run.closing is None for run in own)
    if limits.runs_per_day is not None and today >= limits.runs_per_day:
        raise PolicyRefusal.of(
            "max_runs_per_day",
            f"{today + 1}",
            f"{limits.runs_per_day}",
            f"{today} runs of this coordinator were opened within 24 hours; wait, or ask the steward to raise it",
        )
    if limits.open_runs is not None and open_now >= limits.open_runs:
        raise PolicyRefusal.of(
            "max_open_runs",
            f"{open_now + 1}",
            f"{limits.open_runs}",
            f"{open_now} runs of this coordinator are open; close one, or ask the steward to stop one",
        )


def check_spend(bodies: list[dict[str, Any]], coordinator: str, epsilon: float, delta: float, limits: Limits) -> None:
    """Whether the dataset, the day and the coordinator's share have room for one more reservation.

    Args:
        bodies: the ledger's entries.
        coordinator: who asks.
        epsilon: of the run; 0 before it is known, which refuses a run that would be refused at any epsilon.
        delta: of the run.
        limits: of the policy.

    Raises:
        PolicyRefusal: one of them has no room.
    """
    _check_left(left(bodies), epsilon, delta)
    _check_number(bodies, coordinator)
    _check_day(bodies, epsilon, limits.epsilon_per_day)
    if limits.study is not None:
        check_study(bodies, epsilon, delta, limits.study)


def under(study: Study | None) -> dict[str, str]:
    """How a reservation names its study, where there is one."""
    return {} if study is None else {"study": study.name, "mandate": study.mandate}


def spent_by(bodies: list[dict[str, Any]], study: str) -> Budget:
    """What the runs of a study have reserved.

    What a reconciliation has charged is counted for every study: nobody can tell whose the lost runs were.
    """
    own = [body for body in bodies if body["kind"] == "reconcile" or body.get("study") == study]
    return Budget(*(sum(_counted(body, name) for body in own) for name in ("epsilon", "delta")))


def _counted(body: dict[str, Any], name: str) -> float:
    """What an entry counts for in its study: a run with clients as units takes nothing of the dataset's own budget."""
    return float(body[f"study_{name}" if body["kind"] == "entrust" else name])


def check_unit(bodies: list[dict[str, Any]], unit: str) -> None:
    """A ledger is about one kind of unit: what is spent on records and on clients doesn't add up."""
    units = {body["plan"].get("unit", "record") for body in bodies if body["kind"] == "reserve"}
    if units - {unit}:
        raise PolicyRefusal.of("unit", unit, ", ".join(units), "this ledger is of another unit")


def _latest(bodies: list[dict[str, Any]]) -> float:
    return float(max(body["time"] for body in bodies))


def _check_left(remaining: Budget, epsilon: float, delta: float) -> None:
    for name, asked, there in (("epsilon", epsilon, remaining.epsilon), ("delta", delta, remaining.delta)):
        if asked > there * (1 + 1e-12):
            raise PolicyRefusal.of(
                f"budget_{name}",
                f"{asked:.6g}",
                f"{max(there, 0):.6g}",
                f"the run needs {name} {asked:.4g} and this dataset has {max(there, 0):.4g} left; "
                f"lower privacy.{name}, or ask the steward to raise the budget",
            )


def check_study(bodies: list[dict[str, Any]], epsilon: float, delta: float, study: Study) -> None:
    """Whether a study has room for one more run.

    Args:
        bodies: the ledger's entries.
        epsilon: of the run.
        delta: of the run.
        study: as its mandate has it.

    Raises:
        PolicyRefusal: it has none.
    """
    spent = spent_by(bodies, study.name)
    for name, asked, allowed, before in (
        ("epsilon", epsilon, study.epsilon, spent.epsilon),
        ("delta", delta, study.delta, spent.delta),
    ):
        if before + asked > allowed * (1 + 1e-12):
            raise PolicyRefusal.of(
                f"mandate.budget_{name}",
                f"{before + asked:.6g}",
                f"{allowed:.6g}",
                f"the run needs {name} {asked:.4g}, its study {study.name} has reserved {before:.4g} of the "
                f"{allowed:.4g} that its mandate allows",
            )


def _check_number(bodies: list[dict[str, Any]], coordinator: str) -> None:
    """A receipt names every spend, and one that is too long to be read again would stop the silo for good."""
    spent = sum(1 if body["kind"] == "reserve" else len(body.get("spends", ())) for body in bodies)
    own = sum(body["kind"] == "reserve" and body.get("coordinator") == coordinator for body in bodies)
    for number, most, whose in ((spent, LARGEST_NUMBER_OF_SPENDS, ""), (own, LARGEST_SHARE, " of yours")):
        if number >= most:
            raise PolicyRefusal.of(
                "max_reservations",
                f"{number + 1}",
                f"{most}",
                f"this ledger has {number} reservations{whose} and takes no more; ask for fewer, longer runs, of "
                "another dataset",
            )


def _check_day(bodies: list[dict[str, Any]], epsilon: float, limit: float | None) -> None:
    if limit is None:
        return
    latest = _latest(bodies)
    now = Journal.now(latest)
    remaining = limit - spent_since(bodies, now - DAY_S)
    if epsilon > remaining * (1 + 1e-12):
        ahead = (latest - Journal.now(0.0)) / DAY_S
        remedy = "wait, or lower privacy.epsilon"
        if ahead > 1:  # waiting would take as long as the clock was wrong by
            remedy = (
                f"the ledger's last signed time is {ahead:.0f} days ahead of this machine's clock: ask the steward "
                "to mend the clock, or to raise policy.max_epsilon_per_day"
            )
        raise PolicyRefusal.of(
            "max_epsilon_per_day",
            f"{epsilon:.6g}",
            f"{max(remaining, 0):.6g}",
            f"the run needs epsilon {epsilon:.4g} and {max(remaining, 0):.4g} of {limit:g} is left for 24 hours; "
            f"{remedy}",
        )
