"""Flower's own programs, as this installation has them."""

import os
import sys
from pathlib import Path

BIN = Path(sys.executable).parent
LOOPBACK = "127.0.0.1"
LOOPBACKS = (LOOPBACK, "::1")


def flower_environment(home: Path) -> dict[str, str]:
    """Variables for Flower's programs: no telemetry, no update check, settings in our folder, helpers on the PATH."""
    return {
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",  # seconds until a run's app is started; Flower's own is 1
        **without_proxy(),
    }


def without_proxy() -> dict[str, str]:
    """NO_PROXY with the loopback addresses: a proxy that the environment names can't reach this machine's own ports."""
    names = ("NO_PROXY", "no_proxy")
    there = [address for name in names for address in os.environ.get(name, "").split(",") if address]
    return dict.fromkeys(names, ",".join(dict.fromkeys([*there, *LOOPBACKS, "localhost"])))
