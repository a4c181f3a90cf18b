"""Has a few steps taken on made-up records, by a process of its own that holds no record.

A process, because it can be ended: one that needs more memory than there is, or more time than it is given, takes
nothing of the silo with it.
"""

import json
import os
import signal
import subprocess
import sys
from logging import Logger
from typing import Any

import psutil

from configs.errors import PolicyRefusal
from configs.schema.silo import SiloConfig
from federated.protocol import silo_pb2 as pb
from privacy.plan import PlanTerms

TRIAL_S = 90.0
MEMORY, SLOW, FAILED = "memory", "slow", "failed"
# By the system, by what C++ does where none is left, and by a library that did not look whether it got some.
_FOR_WANT_OF_MEMORY = (-signal.SIGKILL, -signal.SIGABRT, -signal.SIGSEGV)
_STEPS = "federated.silo.rehearsal.steps"


def take(config: SiloConfig, plan: PlanTerms, train: pb.Train, log: Logger) -> pb.Trial | PolicyRefusal:
    """What a round's steps take here, or why the silo would refuse the request once its model is there.

    Args:
        config: the silo, whose places of records the process is not told.
        plan: how large a step's batch is.
        train: the request of a round.
        log: gets what the process says where it fails.
    """
    given = {
        "config": _without_records(config).model_dump(mode="json"),
        "plan": plan.model_dump(mode="json"),
        "most_bytes": psutil.virtual_memory().available,
    }
    content = json.dumps(given).encode() + b"\n" + train.SerializeToString()
    command = [sys.executable, "-P", "-m", _STEPS]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}  # noqa: PTH109
    try:
        done = subprocess.run(  # noqa: S603  (our own command line)
            command, input=content, capture_output=True, env=environment, timeout=TRIAL_S, check=False
        )
    except subprocess.TimeoutExpired:
        return pb.Trial(outcome=SLOW)
    found = _result(done.stdout)
    if found is None:
        log.error("a rehearsal's steps failed (%d): %s", done.returncode, done.stderr.decode(errors="replace")[-4000:])
        return pb.Trial(outcome=MEMORY if done.returncode in _FOR_WANT_OF_MEMORY else FAILED)
    return PolicyRefusal(**found["refusal"]) if "refusal" in found else pb.Trial(**found)


def _without_records(config: SiloConfig) -> SiloConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"source": "none"})})


def _result(said: bytes) -> dict[str, Any] | None:
    """The last line that the process has printed."""
    try:
        found = json.loads(said.splitlines()[-1])
    except (ValueError, IndexError):
        return None
    return found if isinstance(found, dict) else None
