"""A federation's run as its silos know it: an id and an expiry, chosen at its first start and kept for its restarts."""

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.locks import HeldError, locked
from configs.parse import json_object, reading
from configs.run_directory import config_digest
from configs.schema.schema import RunConfig
from configs.storage.files import sync_directory, write_atomic
from configs.storage.sealing import load_key
from federated.coordinator import round_commits as commits
from federated.coordinator.outcome import LOCK
from federated.coordinator.silo_records import SiloRecords
from federated.protocol.clocks import shown
from privacy.plan_from_settings import plan_terms

RUN_FILE = "run.json"
RENEW = "`siloweave federation run --renew`"


@dataclass(frozen=True)
class RunTicket:
    """One run.

    Attributes:
        id: the id under which silos reserve and charge.
        expires: Unix seconds after which silos refuse its requests; part of each request, and so never moved.
    """

    id: str
    expires: int

    @property
    def is_over(self) -> bool:
        """Whether its time is up, by this machine's clock."""
        return self.expires < time.time()

    def clocks(self) -> str:
        """What this machine's clock says beside the expiry."""
        return (
            f"the coordinator's clock says {shown(time.time())}, and run {self.id} is valid until {shown(self.expires)}"
        )

    def require_time(self, directory: Path, cost: Callable[[], str]) -> None:
        """Refuses to ask silos for what they would refuse: the run's time is up.

        Args:
            directory: the federation's.
            cost: says what a renewed run would reserve.

        Raises:
            InputError: it is; the message has the two times, and what a renewal costs.
        """
        if self.is_over:
            raise InputError(
                f"{directory}: {self.clocks()}, after which silos refuse its requests; if the clock is wrong, set it "
                f"and run the same command again; if it is right, {RENEW} (of a simulation: moving this folder away) "
                f"starts the rounds anew and {cost()}; what was reserved before stays spent"
            )


def open_run(directory: Path, lifetime_h: float) -> RunTicket:
    """The run of a federation's directory; a new one where there is none. A run that has no expiry yet is given one.

    Raises:
        InputError: the run's file is damaged. Under a new id the silos would reserve a second time.
    """
    path = directory / RUN_FILE
    found = _read(path) if path.exists() else {}
    run = RunTicket(found.get("run_id", uuid.uuid4().hex), found.get("expires", int(time.time() + lifetime_h * 3600)))
    if "expires" not in found:
        write_atomic(path, json.dumps({"run_id": run.id, "expires": run.expires}).encode())
    return run


def _read(path: Path) -> dict[str, Any]:
    with reading(path, "put its backup back; without its id the silos' budgets would be charged a second time"):
        found = json_object(path.read_bytes(), str(path))
        if not (isinstance(found["run_id"], str) and isinstance(found.get("expires", 0), int)):
            raise TypeError
    return found


def renew(directory: Path, config: RunConfig, say: Callable[[str], None]) -> None:
    """Sets a run whose time is up aside, whole, so that the next start is another run's: new id, new reservation.

    A run whose time is not up, or whose rounds are done, goes on as it is. So the same command may be given again after
    a kill, and reserves nothing twice.

    Args:
        directory: the federation's.
        config: the run's settings.
        say: receives a line about what is done.

    Raises:
        InputError: the run is being worked on, or its files can't be read.
    """
    if not (directory / RUN_FILE).exists():
        return
    ticket = open_run(directory, config.federated.run_lifetime_h)
    newest = commits.newest(directory, config_digest(config), say, load_key(config.run.encryption_key_file))
    if not ticket.is_over or (newest is not None and newest.round_number == config.federated.rounds):
        say(f"nothing is renewed, the run goes on: {ticket.clocks()}")
        return
    aside = directory.with_name(f"{directory.name}-until-{datetime.now(tz=UTC).strftime('%Y%m%d-%H%M%S')}")
    records = SiloRecords(ticket.id, plan_terms(config), signed=True)
    records.restore(newest.silos if newest else {}, str(directory))
    say(f"{ticket.clocks()}: renewed, which {records.cost_anew()}")
    try:
        with locked(directory / LOCK, b"0"):
            directory.rename(aside)
    except HeldError:
        raise InputError(
            f"{directory}: a server app is at work on it; give the command again when it has ended"
        ) from None
    sync_directory(aside.parent)
    say(f"the rounds until now are kept as {aside}; what they reserved stays spent")
