"""What a silo's steward sees, of the service by its silo.toml and of the relay by its relay.toml."""

import re
from pathlib import Path
from typing import Any

from configs.schema.deployment import load_relay
from configs.schema.silo import SiloConfig
from configs.storage.layout import SiloFiles
from federated.deployment.silo_site import roster, trusted
from federated.deployment.supervisor import last_line, read_state
from federated.identity.x509 import days_left, read_certificate
from federated.protocol.framing import SERVICE
from federated.silo.line_file import LineFile
from federated.transport.health import is_serving
from privacy.ledger.chain import Budget, left
from privacy.ledger.journal import Journal
from privacy.ledger.runs import Runs

REFUSALS_SHOWN = 20
_REFUSAL = re.compile(r"\S+ \S+ WARNING refused ")


def silo_status(settings: SiloConfig, journal: Journal, socket: Path | None) -> dict[str, Any]:
    """Health, budget, open runs, trusted coordinators, known silos, certificates and the newest refusals of a silo."""
    files, policy = SiloFiles(Path(settings.silo.state_dir)), settings.policy
    bodies = journal.bodies()
    remaining = left(bodies) if bodies else Budget(policy.budget_epsilon, policy.budget_delta)
    runs = Runs(bodies)
    certificates = {file.stem: days_left(read_certificate(file)) for file in sorted(files.tls.glob("*.crt"))}
    return {
        "silo": settings.silo.id,
        "serving": None if socket is None else is_serving(f"unix:{socket}", SERVICE),
        "epsilon_left": remaining.epsilon,
        "delta_left": remaining.delta,
        "doubt": journal.doubt(),
        "open_runs": [run.name for run in runs.open()],
        "closed_runs": sum(run.closing is not None for run in runs),
        "trusted": trusted(settings),
        "roster": roster(settings),
        "certificate_days_left": certificates,
        "refusals": _refusals(files.log),
    }


def relay_status(path: Path) -> dict[str, Any]:
    """The SuperNode's process."""
    settings = load_relay(path)
    state = read_state(Path(settings.state_dir))
    process = state["programs"]["supernode"] if state else None
    return {
        "relay_to": settings.silo_address,
        "running": process is not None,
        "healthy": bool(process and process["healthy"]),
        "restarts": process["restarts"] if process else 0,
        "last_line": last_line(Path(settings.state_dir) / "supernode.log"),
    }


def _refusals(log: Path) -> list[str]:
    """The newest refusals, in older files too; an indented line goes on with another message, and is none."""
    found: list[str] = []
    for path in LineFile(log).newest_first():
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        found = [line for line in lines if _REFUSAL.match(line)] + found
        if len(found) >= REFUSALS_SHOWN:
            break
    return found[-REFUSALS_SHOWN:]


def lines(found: dict[str, Any]) -> list[str]:
    """The same for people: one line per fact, or per entry where there may be several."""
    text = []
    for name, value in found.items():
        label = name.replace("_", " ")
        if isinstance(value, dict):
            text += [f"{label}: {key}: {entry}" for key, entry in value.items()] or [f"{label}: none"]
        elif isinstance(value, list):
            text += [f"{label}: {entry}" for entry in value] or [f"{label}: none"]
        else:
            text.append(f"{label}: {f'{value:.4g}' if isinstance(value, float) else value}")
    return text
