"""Flower's own programs, as this installation has them."""

import os
import sys
from pathlib import Path

BIN = Path(sys.executable).parent
LOOPBACK = "127.0.0.1"


def flower_environment(home: Path) -> dict[str, str]:
    """Flower's own switches: no telemetry, no update check, its settings below our folder, its helpers found."""
    return {
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
