"""A run over a federation that is served: hands it to Flower, follows the run's own files, and goes on after a kill."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w

from configs.errors import InputError, SiloweaveError
from configs.events import Listener, read_events
from configs.parse import json_object, reading, to_toml
from configs.run_directory import bind_run_directory
from configs.schema.schema import RunConfig
from configs.storage.files import write_atomic
from configs.storage.layout import EVENTS, FEDERATED, RunFiles
from configs.storage.manifests import require_manifest
from configs.storage.storage import COMMITTED
from federated.coordinator.outcome import Outcome, read_outcome, worked_on_by
from federated.coordinator.run_ticket import renew
from federated.deployment.federation_folder import FederationFolder
from federated.deployment.superlink import run_status, start_run, stop_run

POLL_S, ASK_S = 0.5, 3.0
MOST_ATTEMPTS = 5  # ServerApps in a row that die without a round
CURRENT = "current.json"


def run(
    federation: FederationFolder,
    config: RunConfig,
    on_event: Listener,
    renewing: Callable[[str], None] | None = None,
) -> Path:
    """Runs the rounds of the settings over the enrolled silos, from the newest commit to the end.

    A ServerApp or SuperLink that is killed costs the round under way. A command that was interrupted and is given again
    follows the run that it had started.

    Args:
        federation: the coordinator's.
        config: the run's settings.
        on_event: receives the run's events.
        renewing: renews a run whose time is up, and receives the lines about that; None doesn't.

    Returns:
        The run's directory, with rounds, certificate, and the final adapter as peft loads it.

    Raises:
        InputError: no silo is enrolled, or the base model is missing.
        SiloweaveError: as the coordinator raised it, with its exit status.
    """
    silos = federation.silos()
    if not silos:
        raise InputError(f"{federation.folder}: no silo is enrolled; take them in with `siloweave federation enrol`")
    files = RunFiles(bind_run_directory(config))
    model, directory = files.model, files.federated
    require_manifest(model, "model", config.model.made_by)
    if renewing is not None:
        renew(directory, config, renewing)
    settings = federation.state / "run-config.toml"
    given = {
        "config": to_toml(config),
        "base-model": str(model),
        "directory": str(directory),
        "coordinator": str(federation.folder),
        "num-silos": len(silos),
    }
    write_atomic(settings, tomli_w.dumps(given).encode(), mode=0o600)
    seen = sum(1 for _ in read_events(directory / EVENTS))
    attempts, rounds = 0, num_rounds(directory)
    flower_run = _under_way(federation, directory)
    while attempts < MOST_ATTEMPTS:
        if flower_run is None:
            flower_run = start_run(federation, settings)
            current = {"directory": str(directory), "run": config.run.name, "flower_run": flower_run}
            write_atomic(federation.state / CURRENT, json.dumps(current).encode())
        outcome, seen = follow(federation, directory, flower_run, seen, on_event)
        if outcome is not None:
            return _finish(config, model, directory, outcome)
        attempts = 0 if num_rounds(directory) > rounds else attempts + 1
        rounds, flower_run = num_rounds(directory), None
    raise SiloweaveError(
        f"{directory}: the server app died {MOST_ATTEMPTS} times without a round; see {federation.state}/superlink.log"
    )


def _finish(config: RunConfig, model: Path, directory: Path, outcome: Outcome) -> Path:
    from federated.coordinator.final_model import publish

    outcome.require_success()
    publish(config, model, directory, FEDERATED)
    return directory


def _under_way(federation: FederationFolder, directory: Path) -> int | None:
    """Flower's number of a run that works on the directory already."""
    current = read_current(federation)
    if current is None or current["directory"] != str(directory):
        return None
    flower_run = int(current["flower_run"])
    ended = read_outcome(directory, flower_run) or run_status(federation, flower_run)[0] == "finished"
    return None if ended else flower_run


def read_current(federation: FederationFolder) -> dict[str, Any] | None:
    """The newest run: its directory, its name, and Flower's number.

    Raises:
        InputError: the file says something else.
    """
    path = federation.state / CURRENT
    if not path.exists():
        return None
    with reading(path, "delete it; `siloweave federation run` writes it anew"):
        current = json_object(path.read_bytes(), str(path))
        Path(current["directory"]), str(current["run"]), int(current.get("flower_run", 0))
    return current


def num_rounds(directory: Path) -> int:
    """Committed rounds, the start not counted."""
    return max(0, len(list(directory.glob(f"round-*/{COMMITTED}"))) - 1)


def follow(
    federation: FederationFolder, directory: Path, flower_run: int, seen: int, on_event: Listener
) -> tuple[Outcome | None, int]:
    """Passes events on until the ServerApp has ended; None where it died without a word."""
    asked, worked = 0.0, False
    while True:
        for event in list(read_events(directory / EVENTS))[seen:]:
            seen += 1
            on_event(event)
        works = worked_on_by(directory) == flower_run
        outcome = read_outcome(directory, flower_run)  # is written before the ServerApp lets go of the directory
        if outcome is not None:
            return outcome, seen
        if worked and not works and _is_told(federation, flower_run):
            return None, seen
        if not works and time.monotonic() - asked > ASK_S:
            if _has_ended(federation, flower_run) and read_outcome(directory, flower_run) is None:
                return None, seen
            asked = time.monotonic()
        worked = worked or works
        time.sleep(POLL_S)


def _is_told(federation: FederationFolder, flower_run: int) -> bool:
    """Tells Flower what its heartbeats would only show it later: that the run's ServerApp is gone."""
    try:
        stop_run(federation, flower_run)
    except SiloweaveError:  # the SuperLink is being restarted
        return False
    return True


def _has_ended(federation: FederationFolder, flower_run: int) -> bool:
    try:
        return run_status(federation, flower_run)[0] == "finished"
    except SiloweaveError:
        return False
