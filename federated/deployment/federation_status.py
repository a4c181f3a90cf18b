"""What a coordinator sees of its federation: processes, silos, the run's round, budgets left, refusals."""

from pathlib import Path
from typing import Any

from configs.errors import SiloweaveError
from configs.events import is_number
from configs.salvage import Salvage, read_json
from configs.storage.layout import CERTIFICATE, EVENTS
from configs.storage.storage import COMMITTED
from federated.coordinator.outcome import LOCK, worked_on_by
from federated.coordinator.round_commits import SILOS
from federated.deployment.federation_folder import FederationFolder
from federated.deployment.served_run import CURRENT, read_current
from federated.deployment.superlink import nodes
from federated.deployment.supervisor import STATE, read_state
from federated.identity.x509 import days_left, read_certificate

REFUSALS_SHOWN = 20
_BUDGET = ("epsilon_left", "delta_left", "epsilon_reserved")
_TROUBLE = ("refused", "rejected", "timeout", "lost")


def status(federation: FederationFolder) -> dict[str, Any]:
    """Everything that is known here; nothing in it comes from private data but what silos released.

    One looks when something is broken: of each file that can't be read there is one line in ``unreadable``, and the
    rest is shown.
    """
    salvage, state = Salvage(), federation.state
    processes = salvage.tried(state / STATE, lambda: read_state(state), None)
    current = salvage.tried(state / CURRENT, lambda: read_current(federation), None)
    directory = Path(current["directory"]) if current else None
    return {
        "federation": federation.config.name,
        "address": federation.card.address,
        "certificate_days_left": days_left(read_certificate(federation.certificates / "proxy.pem")),
        "processes": processes["programs"] if processes else {},
        "silos": _silos(federation, directory, salvage, running=processes is not None),
        "run": _run(str(current["run"]), directory, salvage) if current and directory else None,
        "unreadable": salvage.problems,
    }


def _silos(
    federation: FederationFolder, directory: Path | None, salvage: Salvage, *, running: bool
) -> dict[str, dict[str, Any]]:
    online: dict[str, dict[str, Any]] = {}
    if running:
        try:
            online = nodes(federation)
        except SiloweaveError:
            online = {}
    told = _newest_receipts(directory, salvage)
    return {
        name: {"status": online.get(name, {}).get("status", "unknown"), **told.get(name, dict.fromkeys(_BUDGET))}
        for name in federation.silos()
    }


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


def _run(name: str, directory: Path, salvage: Salvage) -> dict[str, Any]:
    events = salvage.events(directory / EVENTS)
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
