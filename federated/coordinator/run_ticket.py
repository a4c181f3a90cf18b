"""A federation's run as its silos know it: an id and an expiry, chosen at its first start and kept for its restarts."""

import json
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from configs.storage.files import write_atomic

RUN_FILE = "run.json"


@dataclass(frozen=True)
class RunTicket:
    """One run.

    Attributes:
        id: the id under which silos reserve and charge.
        expires: Unix seconds after which silos refuse its requests; part of each request, and so never moved.
    """

    id: str
    expires: int


def open_run(directory: Path, lifetime_h: float) -> RunTicket:
    """The run of a federation's directory; a new one where there is none. A run that has no expiry yet is given one."""
    path = directory / RUN_FILE
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    run = RunTicket(found.get("run_id", uuid.uuid4().hex), found.get("expires", int(time.time() + lifetime_h * 3600)))
    if "expires" not in found:
        write_atomic(path, json.dumps({"run_id": run.id, "expires": run.expires}).encode())
    return run
