"""Seconds and bytes of a bundle, from the folder to a rehearsed and a finished run, where no network is.

sudo .../python benchmarks/bundle.py --model runs/tiny/model --json bundle.json

The environment that runs it makes the bundle: Siloweave is installed there from a wheel, with the extras `bundle` and
`demo`. Checks, installation and `rehearse.py` then run in a network namespace that has nothing but its loopback, which
takes root. SuperLink, nginx, two relays and two silo services are all of what the bundle has installed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from figures import setting

_ALONE = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")


def timed(*command: str, home: Path) -> tuple[str, float]:
    """What a command says, and its seconds."""
    began = time.perf_counter()
    environment = {**os.environ, "HOME": str(home), "XDG_STATE_HOME": str(home)}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return done.stdout, time.perf_counter() - began


def measure(root: Path, model: Path) -> dict[str, Any]:
    """All steps, one after the other."""
    siloweave = (sys.executable, "-P", "-m", "siloweave")
    federation, folder, target = (str(root / name) for name in ("federation", "bundle", "site"))
    said = root / "rehearse.json"
    timed(*siloweave, "federation", "init", federation, "--name", "net", "--host", "127.0.0.1", home=root)
    given = ("bundle", federation, folder, "--model", str(model), "--extra", "demo", "--json")
    made, making_s = timed(*siloweave, *given, home=root)
    code = json.loads(made)["fingerprint"]
    _, checking_s = timed(*_ALONE, "sh", f"{folder}/install.sh", code, home=root)
    _, installing_s = timed(*_ALONE, "sh", f"{folder}/install.sh", code, target, home=root)
    rehearse = str(Path(__file__).with_name("rehearse.py"))
    given = (f"{target}/bin/python", rehearse, "--model", f"{folder}/model", "--rounds", "2", "--json", str(said))
    _, federation_s = timed(*_ALONE, *given, home=root)
    (rehearsal,) = json.loads(said.read_text())["model 1"]["runs"]["2 steps"]
    return {
        "packages": json.loads(made)["packages"],
        "bytes": sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()),
        "seconds": {
            "making it": making_s,
            "checking it": checking_s,
            "checking and installing": installing_s,
            "two sites enrolled, rehearsed, and two rounds": federation_s,
            "from the bundle to the end of the run": installing_s + federation_s,
            "the rehearsal alone": rehearsal["seconds of the rehearsal"],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="an exported model, as runs/tiny/model")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bundle-") as root:
        found = measure(Path(root), options.model.absolute())
    result = {**setting(["siloweave", "flwr", "torch"]), **found}
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
