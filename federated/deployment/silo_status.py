"""What a silo's steward sees, of the service by its silo.toml and of the relay by its relay.toml."""

from pathlib import Path
from typing import Any

from configs.schema.deployment import load_relay
from configs.schema.silo import SiloConfig
from configs.storage.layout import SiloFiles
from federated.deployment.silo_site import roster, trusted
from federated.deployment.steward.ledger_look import Looked
from federated.deployment.steward.mandate_rows import how_it_stands, is_revoked, mandate_rows
from federated.deployment.steward.messages import refusal_lines
from federated.deployment.supervisor import last_line, read_state
from federated.identity.x509 import days_left, read_certificate
from federated.protocol.framing import SERVICE
from federated.transport.health import is_serving
from privacy.ledger.chain import Budget, left
from privacy.ledger.runs import Runs


def silo_status(settings: SiloConfig, looked: Looked, socket: Path | None) -> dict[str, Any]:
    """Health, budget, open runs, whom a silo trusts and knows, mandates, certificates and the newest refusals."""
    files, policy = SiloFiles(Path(settings.silo.state_dir)), settings.policy
    bodies = looked.bodies
    remaining = left(bodies) if bodies else Budget(policy.budget_epsilon, policy.budget_delta)
    runs, mandates = Runs(bodies), mandate_rows(settings, looked)
    return {
        "silo": settings.silo.id,
        "serving": is_up(socket),
        "epsilon_left": remaining.epsilon,
        "delta_left": remaining.delta,
        "doubt": looked.doubt,
        "open_runs": [run.name for run in runs.open()],
        "closed_runs": sum(run.closing is not None for run in runs),
        "trusted": trusted(settings),
        "roster": roster(settings),
        "mandates": {row["study"]: how_it_stands(row) for row in mandates if not is_revoked(row)},
        "certificate_days_left": certificates(files),
        "refusals": refusal_lines(files),
    }


def is_up(socket: Path | None) -> bool | None:
    """Whether a silo's service is serving; None where there is no socket to ask at."""
    return None if socket is None else is_serving(f"unix:{socket}", SERVICE)


def certificates(files: SiloFiles) -> dict[str, int]:
    """Days for which the certificates of service and relay are valid."""
    return {file.stem: days_left(read_certificate(file)) for file in sorted(files.tls.glob("*.crt"))}


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
