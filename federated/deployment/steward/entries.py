"""What a ledger's entries tell its steward: the runs, who has spent what, and what has left."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from configs.schema.silo import SiloConfig
from federated.deployment.silo_site import trusted
from privacy.ledger.client_runs import UNNOISED
from privacy.ledger.runs import Run, Runs

_KEY_SHOWN = 16  # hexadecimal digits
_RECONCILED = "lost spends, charged by a reconciliation"


class Coordinators:
    """How a steward calls coordinators: by their names, where they are trusted, and by the beginning of their keys."""

    def __init__(self, settings: SiloConfig) -> None:
        self._names = {key: name for name, key in trusted(settings).items()}

    def called(self, key: str) -> tuple[str, ...]:
        """All that a coordinator may be called by."""
        if not key:
            return ("not named",)
        short = key[:_KEY_SHOWN]
        return (self._names[key], short) if key in self._names else (short,)

    def shown(self, key: str) -> str:
        """The same in one line."""
        return " ".join(self.called(key))


def run_row(run: Run, coordinators: Coordinators) -> dict[str, Any]:
    """A run: whose it is, what it reserved, how far it is."""
    opening = run.opening
    return {
        "entry": opening["number"],
        "run": run.name,
        "coordinator": coordinators.shown(run.coordinator),
        "study": opening.get("study", ""),
        "epsilon_reserved": opening.get("epsilon", 0.0),
        "delta_reserved": opening.get("delta", 0.0),
        "rounds_charged": run.rounds_charged,
        "rounds_planned": opening["plan"]["rounds"],
        "opened": at(opening["time"]),
        "state": "stopped by the steward" if run.stopped else "open" if run.closing is None else "closed",
    }


def spent_rows(bodies: Iterable[dict[str, Any]], coordinators: Coordinators) -> list[dict[str, Any]]:
    """What was reserved, summed by coordinator and study, in the order of their first runs."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for body in bodies:
        if body["kind"] == "reserve":
            whose = coordinators.shown(body.get("coordinator", "")), body.get("study", "")
        elif body["kind"] == "reconcile":
            whose = _RECONCILED, ""
        else:
            continue
        empty = {"coordinator": whose[0], "study": whose[1], "runs": 0, "epsilon": 0.0, "delta": 0.0}
        row = rows.setdefault(whose, empty)
        row["runs"] += body["kind"] == "reserve"
        row["epsilon"] += body["epsilon"]
        row["delta"] += body["delta"]
    return list(rows.values())


def left_rows(bodies: list[dict[str, Any]], coordinators: Coordinators) -> Iterator[dict[str, Any]]:
    """Every release, oldest first: of which run it was, what for, and which bytes it may have sent."""
    charges = {charge["number"]: (run, charge) for run in Runs(bodies) for charge in run.charges}
    for body in bodies:
        if body["kind"] == "release" and body["charge"] in charges:
            run, charge = charges[body["charge"]]
            sent = {"bytes": body["reply_bytes"], "digest": body["reply_digest"]}
        elif body["kind"] == UNNOISED and body["number"] in charges:
            (run, charge), sent = charges[body["number"]], {"bytes": None, "digest": None}
        else:
            continue
        whose = {"run": run.name, "coordinator": coordinators.shown(run.coordinator)}
        yield {"time": at(body["time"]), **whose, "what": _what(charge), **sent}


def _what(charge: dict[str, Any]) -> str:
    if charge.get("metric"):
        return f"{charge['metric']}, {charge['metric_number']}. release"
    return f"round {charge['round']}" + (", without noise of its own" if charge["kind"] == UNNOISED else "")


def at(seconds: float) -> str:
    """A time, in seconds since 1970, for people and machines; one that no calendar has is shown as it is."""
    with suppress(ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(seconds, tz=UTC).isoformat(timespec="seconds")
    return f"{seconds:g}"
