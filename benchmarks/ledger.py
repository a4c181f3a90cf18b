"""What a training request asks of its silo's ledger, by how many entries that holds: accept, charge, receipt, release.

Each request runs in turn on ledgers of all sizes, so that the machine's moods hit them alike. A file of bytes that is
synced to the same disk is timed beside them: what a ledger can't be faster than.

python benchmarks/ledger.py --json ledger.json
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from figures import setting, spread

from privacy.ledger.chain import Budget
from privacy.ledger.ledger import Ledger
from privacy.plan import PlanRequest

ROUNDS = 100_000
PLAN = PlanRequest(
    unit="record",
    sampling_rate=1e-4,
    noise_multiplier=2.0,
    delta=1e-9,
    rounds=ROUNDS,
    steps_per_round=1,
    max_grad_norm=1.0,
)


def ledger_of(folder: Path, entries: int) -> Ledger:
    """A ledger in which one run has been charged until it holds so many entries."""
    ledger = Ledger.open(folder / f"{entries}", "silo", "records", Budget(100.0, 1e-3))
    ledger.reserve("run", PLAN.bind(100_000))
    with ledger.journal.locked():
        for number in range(1, (entries - 2) // 2 + 1):
            charge = ledger.journal.append("charge", run="run", request=f"r{number}", round=number, digest="0" * 64)
            ledger.journal.append("release", run="run", charge=charge, reply_digest="0" * 64, reply_bytes=1)
    ledger.journal.move_anchor()
    return ledger


def request(ledger: Ledger, round_number: int) -> float:
    """Milliseconds of what one training request does with the ledger."""
    began = time.perf_counter()
    ledger.accept(ledger.receipt("run"))
    charge = ledger.charge("run", f"new-{round_number}", f"{round_number:064}", round_number)
    ledger.receipt("run")
    ledger.release(charge.number, "run", bytes(1000))
    return 1000 * (time.perf_counter() - began)


def synced(folder: Path) -> float:
    """Milliseconds until a kilobyte is on the disk."""
    began = time.perf_counter()
    with (folder / "synced").open("ab") as file:
        file.write(bytes(1000))
        file.flush()
        os.fsync(file.fileno())
    return 1000 * (time.perf_counter() - began)


def measure(sizes: list[int], repetitions: int) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ledgers = {size: ledger_of(folder, size) for size in sizes}
        found: dict[str, list[float]] = {}
        for repetition in range(repetitions):
            for size, ledger in ledgers.items():
                milliseconds = request(ledger, ROUNDS - repetition)
                found.setdefault(f"{size} entries", []).append(milliseconds)
            found.setdefault("a kilobyte synced", []).append(synced(folder))
    return {what: spread(values) for what, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, nargs="+", default=[10, 1000, 10_000])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    document: dict[str, Any] = {
        **setting(("numpy",)),
        "repetitions": arguments.repetitions,
        "milliseconds": measure(arguments.entries, arguments.repetitions),
    }
    arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    for what, figure in document["milliseconds"].items():
        print(f"{what:>20}: {figure['median']:8.1f} ms ({figure['minimum']:.1f} to {figure['maximum']:.1f})")


if __name__ == "__main__":
    main()
