"""What a coordinator sees of its federation: processes, silos, the run's round, budgets left, refusals."""

import json
from pathlib import Path
from typing import Any

from configs.errors import SiloweaveError
from configs.events import read_events
from configs.storage.layout import CERTIFICATE, EVENTS
from configs.storage.storage import COMMITTED
from federated.coordinator.outcome import worked_on_by
from federated.deployment.federation_folder import FederationFolder
from federated.deployment.served_run import read_current
from federated.deployment.superlink import nodes
from federated.deployment.supervisor import read_state
from federated.identity.x509 import days_left, read_certificate

REFUSALS_SHOWN = 20
_TROUBLE = ("refused", "rejected", "timeout")


def status(federation: FederationFolder) -> dict[str, Any]:
    """Everything that is known here; nothing in it comes from private data but what silos released."""
    processes = read_state(federation.state)
    current = read_current(federation)
    directory = Path(current["directory"]) if current else None
    return {
        "federation": federation.config.name,
        "address": federation.card.address,
        "certificate_days_left": days_left(read_certificate(federation.certificates / "proxy.pem")),
        "processes": processes["programs"] if processes else {},
        "silos": _silos(federation, directory, running=processes is not None),
        "run": _run(current["run"], directory) if current and directory else None,
    }


def _silos(federation: FederationFolder, directory: Path | None, *, running: bool) -> dict[str, dict[str, Any]]:
    online: dict[str, dict[str, Any]] = {}
    if running:
        try:
            online = nodes(federation)
        except SiloweaveError:
            online = {}
    told, found = _newest_silos(directory), {}
    for name in federation.silos():
        receipt = told.get(name, {}).get("receipt", {})
        found[name] = {
            "status": online.get(name, {}).get("status", "unknown"),
            "epsilon_left": receipt.get("epsilon_left"),
            "delta_left": receipt.get("delta_left"),
            "epsilon_reserved": receipt.get("epsilon_reserved"),
        }
    return found


def _newest_silos(directory: Path | None) -> dict[str, dict[str, Any]]:
    """What the silos had told of themselves at the newest commit, their receipts among it."""
    committed = sorted(directory.glob(f"round-*/{COMMITTED}")) if directory else []
    if not committed:
        return {}
    return dict(json.loads((committed[-1].parent / "silos.json").read_text(encoding="utf-8")))


def _run(name: str, directory: Path) -> dict[str, Any]:
    events = list(read_events(directory / EVENTS))
    rounds = [event for event in events if event["event"] == "round"]
    last = rounds[-1] if rounds else {}
    return {
        "name": name,
        "directory": str(directory),
        "working": worked_on_by(directory) is not None,
        "finished": (directory / CERTIFICATE).exists(),
        "round": last.get("round", 0),
        "rounds": last.get("rounds"),
        "answered": last.get("answered", []),
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
        text += [f"    {_trouble(event)}" for event in run["trouble"]]
    return text


def _trouble(event: dict[str, Any]) -> str:
    what = event.get("message") or f"{event.get('missing')} silos did not answer"  # of a run of before, it was a number
    return f"{event['event']} at {event.get('step')}: {what}"
