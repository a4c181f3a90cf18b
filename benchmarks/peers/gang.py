"""Siloweave's own: `siloweave pretrain` without its console, with each step's time by the rank's clock.

python benchmarks/peers/gang.py CONFIG RECORD
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any


def main() -> None:
    from cluster.pipeline import _forward
    from cluster.run import Run
    from cluster.runtime.gang import run_gang
    from configs.load import load

    run = Run(load(sys.argv[1]))
    forward = partial(_forward, run.log, "pretrain")
    with Path(sys.argv[2]).open("a", buffering=1) as record:

        def report(event: dict[str, Any]) -> None:
            forward(event)
            record.write(json.dumps(event) + "\n")

        with run.stage("pretrain"), run.ray():
            run_gang(run.config, run.directory, report)


if __name__ == "__main__":
    main()
