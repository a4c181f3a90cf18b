"""Seconds in which a run's dossier is made, and checked where there is no network.

python benchmarks/dossier.py --run runs/demo --repetitions 5 --json dossier.json

The commands themselves, `siloweave dossier`, from start to end. Each time it is made anew in an empty folder, and
checked in a network namespace of its own, which has no interface that is up; for that the script is root.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from figures import setting, spread


def seconds(*command: str) -> float:
    """How long a command takes that succeeds."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a finished run, whose federation has a certificate")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    dossier = [str(Path(sys.executable).with_name("siloweave")), "dossier"]
    made, checked, size = [], [], 0
    for _ in range(options.repetitions):
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "dossier"
            made.append(seconds(*dossier, str(options.run), "--output", str(place)))
            checked.append(seconds("unshare", "--net", *dossier, "--verify", str(place)))
            size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    result: dict[str, Any] = setting(["siloweave"])
    result |= {"seconds to make": spread(made), "seconds to check": spread(checked), "bytes": size}
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
