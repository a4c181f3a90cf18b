"""What a coordinator sees of its federation: processes, silos, the run's round, budgets left, refusals."""

import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from configs.errors import InputError, SiloweaveError
from configs.events import is_number
from configs.salvage import Salvage, read_json
from configs.storage.layout import CERTIFICATE, EVENTS
from configs.storage.storage import COMMITTED
from federated.coordinator.outcome import LOCK, worked_on_by
from federated.coordinator.round_commits import SILOS
from federated.deployment.federation_folder import FederationFolder, node_key
from federated.deployment.served_run import CURRENT, read_current
from federated.deployment.steward.entries import at
from federated.deployment.superlink import nodes
from federated.deployment.supervisor import STATE, read_state
from federated.identity.cards import EnrolledSilo, read_document
from federated.identity.trust import ENROLLED
from federated.identity.x509 import days_left, read_certificate

REFUSALS_SHOWN = 20
_BUDGET = ("epsilon_left", "delta_left", "epsilon_reserved")
_TROUBLE = ("refused", "rejected", "timeout", "lost")
_STATES = {"refused": "refuses", "rejected": "no sound reply", "timeout": "silent"}
_ROUNDS_SHOWN, _RECENT = 20, 10  # rounds, from which a run's pace is taken
Events = list[dict[str, Any]]


def status(federation: FederationFolder) -> dict[str, Any]:
    """Everything that is known here; nothing in it comes from private data but what silos released.

    One looks when something is broken: of each file that can't be read there is one line in ``unreadable``, and the
    rest is shown.
    """
    return _seen(federation)[0]


def overview(federation: FederationFolder) -> dict[str, Any]:
    """The same with what each site does now and why, the newest rounds, and their pace."""
    found, events = _seen(federation)
    rounds = [_round(event) for event in events if event["event"] == "round" and is_number(event.get("round"))]
    sites = {name: _site(name, silo, events, served=bool(found["processes"])) for name, silo in found["silos"].items()}
    return {**found, "time": at(time.time()), "silos": sites, "rounds": rounds[-_ROUNDS_SHOWN:], "pace": _pace(rounds)}


def _seen(federation: FederationFolder) -> tuple[dict[str, Any], Events]:
    salvage, state = Salvage(), federation.state
    processes = salvage.tried(state / STATE, lambda: read_state(state), None)
    current = salvage.tried(state / CURRENT, lambda: read_current(federation), None)
    directory = Path(current["directory"]) if current else None
    events = salvage.events(directory / EVENTS) if directory else []
    found = {
        "federation": federation.config.name,
        "address": federation.card.address,
        "certificate_days_left": days_left(read_certificate(federation.certificates / "proxy.pem")),
        "processes": processes["programs"] if processes else {},
        "silos": _silos(federation, directory, salvage, running=processes is not None),
        "run": _run(str(current["run"]), directory, events, salvage) if current and directory else None,
        "unreadable": salvage.problems,
    }
    return found, events


def _silos(
    federation: FederationFolder, directory: Path | None, salvage: Salvage, *, running: bool
) -> dict[str, dict[str, Any]]:
    online: dict[str, dict[str, Any]] = {}
    cards = _enrolled(federation, salvage)
    if running:
        try:
            online = nodes(federation, cards)
        except SiloweaveError:
            online = {}
    told = _newest_receipts(directory, salvage)
    unknown = {"status": "unknown", "node": None}
    return {name: {**unknown, **online.get(name, {}), **told.get(name, dict.fromkeys(_BUDGET))} for name in cards}


def _enrolled(federation: FederationFolder, salvage: Salvage) -> dict[str, EnrolledSilo]:
    """The silos whose documents can be read, and have a key."""
    paths = sorted((federation.folder / ENROLLED).glob("*.json"))
    found = [salvage.tried(path, partial(_card, path), None) for path in paths]
    return {card.silo: card for card in found if card is not None}


def _card(path: Path) -> EnrolledSilo:
    card = read_document(EnrolledSilo, path)
    try:
        node_key(card)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return card


def _newest_receipts(directory: Path | None, salvage: Salvage) -> dict[str, dict[str, float]]:
    """What the silos had left at the newest commit, by their receipts."""
    committed = sorted(directory.glob(f"round-*/{COMMITTED}")) if directory else []
    if not committed:
        return {}
    path = committed[-1].parent / SILOS

    def look() -> dict[str, dict[str, float]]:
        receipts = {name: told["receipt"] for name, told in read_json(path).items() if "receipt" in told}
        found = {name: {figure: receipt[figure] for figure in _BUDGET} for name, receipt in receipts.items()}
        if not all(is_number(value) for figures in found.values() for value in figures.values()):
            raise TypeError
        return found

    return salvage.tried(path, look, {})


def _run(name: str, directory: Path, events: Events, salvage: Salvage) -> dict[str, Any]:
    rounds = [event for event in events if event["event"] == "round"]
    last = rounds[-1] if rounds else {}
    return {
        "name": name,
        "directory": str(directory),
        "working": salvage.tried(directory / LOCK, lambda: worked_on_by(directory), None) is not None,
        "finished": (directory / CERTIFICATE).exists(),
        "round": last.get("round", 0),
        "rounds": last.get("rounds"),
        "answered": last.get("answered", []),
        "secure_aggregation": any(event["event"] == "secure_sum" for event in events),
        "seconds": last.get("seconds"),
        "bytes": last.get("bytes"),
        "trouble": [event for event in events if event["event"] in _TROUBLE][-REFUSALS_SHOWN:],
    }


def _site(name: str, silo: dict[str, Any], events: Events, *, served: bool) -> dict[str, Any]:
    """A silo with what it does now: up, down, refuses, and the like; and why."""
    trouble = _newest_trouble(name, silo["node"], events)
    reason = _trouble(trouble) if trouble else ""
    if not served:
        state, reason = "unknown", "nothing is served here: `siloweave federation serve`"
    elif silo["status"] == "unknown":
        state, reason = "unknown", "the SuperLink does not tell of it"
    elif silo["status"] != "online":
        said = f"its relay is not connected (Flower says {silo['status']})"
        state, reason = "down", f"{said}; before that: {reason}" if reason else said
    else:
        state = "up" if trouble is None else _STATES[trouble["event"]]
        state = "refuses" if trouble and trouble.get("rule") else state
    return {**silo, "state": state, "reason": reason}


def _newest_trouble(name: str, node: int | None, events: Events) -> dict[str, Any] | None:
    """What of a silo has come to nothing since it last answered a round."""
    for event in reversed(events):
        if event["event"] == "round" and name in _names(event.get("answered")):
            return None
        named = event.get("silo") == name or (node is not None and event.get("node") == node)
        silent = event["event"] == "timeout" and name in _names(event.get("silos"))
        if event["event"] in _STATES and (named or silent):
            return event
    return None


def _names(value: object) -> Iterable[object]:
    return value if isinstance(value, list) else ()


def _round(event: dict[str, Any]) -> dict[str, Any]:
    """A round's figures; those that an event lacks are none."""
    figures = {name: event.get(name) for name in ("rounds", "seconds", "bytes", "epsilon_left")}
    sound = {name: value if is_number(value) else None for name, value in figures.items()}
    return {
        "time": at(event["time"]),
        "round": event["round"],
        "answered": list(_names(event.get("answered"))),
        **sound,
    }


def _pace(rounds: list[dict[str, Any]]) -> dict[str, Any] | None:
    """How fast the newest rounds were, and how long the others take at that pace; None before the first."""
    recent = [one for one in rounds if (one["seconds"] or 0) > 0 and one["bytes"] is not None][-_RECENT:]
    if not recent:
        return None
    seconds, last = median(one["seconds"] for one in recent), rounds[-1]
    return {
        "rounds": len(recent),
        "seconds_per_round": seconds,
        "bytes_per_round": median(one["bytes"] for one in recent),
        "bytes_per_second": sum(one["bytes"] for one in recent) / sum(one["seconds"] for one in recent),
        "seconds_to_go": None if last["rounds"] is None else max(0, last["rounds"] - last["round"]) * seconds,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    days = found["certificate_days_left"]
    text = [f"{found['federation']} at {found['address']}; its certificate is valid for {days} days"]
    for name, process in found["processes"].items():
        text.append(f"  {name}: {'healthy' if process['healthy'] else 'not healthy'}, {process['restarts']} restarts")
    if not found["processes"]:
        text.append("  not served")
    for name, silo in found["silos"].items():
        left = silo["epsilon_left"]
        budget = "no receipt yet" if left is None else f"epsilon {left:.4g} left"
        text.append(f"  silo {name}: {silo['status']}; {budget}")
    run = found["run"]
    if run is not None:
        state = "finished" if run["finished"] else "at work" if run["working"] else "not at work"
        total = run["rounds"] or "?"
        text.append(f"  run {run['name']}: {state}, round {run['round']} of {total}; see {run['directory']}")
        text += ["    updates are added up under masks"] if run["secure_aggregation"] else []
        text += [f"    {_trouble(event)}" for event in run["trouble"]]
    return text + [f"  unreadable: {problem}" for problem in found["unreadable"]]


def _trouble(event: dict[str, Any]) -> str:
    what = event.get("message") or f"{event.get('missing')} silos did not answer"  # of a run of before, it was a number
    return f"{event['event']} at {event.get('step', event.get('round'))}: {what}"
