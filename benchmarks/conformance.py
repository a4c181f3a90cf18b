"""Runs every privacy trap against Opacus, Flower's DP strategies and Siloweave, and prints the table.

python benchmarks/conformance.py --json conformance.json --markdown docs/conformance.md
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from figures import setting

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout's own packages, as the tests take them

from traps.cell import MEANING, Cell
from traps.layers import LAYERS

LIBRARIES = ("opacus", "flower", "siloweave")
TITLES = {
    **{
        f"sum_{name}": f"clipped sum against a loop over single records: {layer.title}"
        for name, layer in LAYERS.items()
    },
    "largest": "what one unit adds to a sum is at most C",
    "micro_batches": "micro-batches 1x32 = 4x8 = 32x1",
    "hostile_adapters": "one record under an attacker's adapters: it moves the sum by at most C",
    "non_finite": "one unit with inf or NaN",
    "noise": "noise: standard deviation within 1%, uncorrelated across steps and parameters",
    "world_sizes": "the same total noise at world sizes 1, 2, 4",
    "uneven_ranks": "ranks with unequal micro-batches",
    "empty_batch": "an empty Poisson batch is a step, noised and accounted",
    "sampling": "inclusion counts binomial and pairwise independent",
    "shuffling": "a shuffling loader accounted as Poisson",
    "resume": "resumed equals uninterrupted, bit for bit",
    "other_adapter": "the same run and step over another adapter: unrelated noise",
    "killed": "kill -9 between spending and saving",
    "two_processes": "two processes on one record of spending",
    "edited": "an edited entry in the record of spending",
    "restored": "an old record of spending put back",
    "without_wal": "a copy of the record of spending without its write-ahead log",
    "dropout": "a missing silo or client never lowers the noise below what is charged",
    "weights": "weights fixed and public",
    "number_of_records": "the number of records changes nothing that leaves",
    "refusals": "refusals and failures alike on neighbouring datasets",
    "personal_state": "personal state (buffers, moments, metrics) never reaches a release",
    "generator": "noise from a cryptographic generator",
    "mask_keys": "masks of secure aggregation: keys of 256 bits, a cryptographic generator",
    "zero_update": "an update of zeros",
    "client_sampling": "client sampling never enters a record-level event",
}


def run_library(library: str, traps: list[str]) -> dict[str, Cell]:
    """Every trap in one library; an exception that a check doesn't expect ends the program."""
    from importlib import import_module

    cells = import_module(f"traps.{library}").CELLS
    found = {}
    for trap in traps:
        began = time.perf_counter()
        found[trap] = cells[trap]()
        seconds = time.perf_counter() - began
        print(f"{library} {trap}: {found[trap].verdict} ({seconds:.0f} s)", file=sys.stderr, flush=True)
    return found


def described() -> dict[str, Any]:
    """Date, machine and versions."""
    return setting(("opacus", "flwr", "torch", "transformers", "peft", "numpy", "dp-accounting", "siloweave"))


def markdown(document: dict[str, Any]) -> str:
    """The page: what the verdicts mean, the table, and the evidence."""
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    machine = f"{document['machine']['cores']} cores of {document['machine']['processor']}"
    rows = [
        "| " + " | ".join([TITLES[trap], *(cells[library]["verdict"] for library in LIBRARIES)]) + " |"
        for trap, cells in document["traps"].items()
    ]
    evidence = []
    for trap, cells in document["traps"].items():
        lines = [
            f"- {library}, {cells[library]['verdict']}: {_escaped(cells[library]['evidence'])}" for library in LIBRARIES
        ]
        evidence += ["", f"**{TITLES[trap]}**", "", *lines]
    counts = {
        library: [
            sum(cells[library]["verdict"] == verdict for cells in document["traps"].values()) for verdict in MEANING
        ]
        for library in LIBRARIES
    }
    totals = [
        f"| {verdict} | " + " | ".join(str(counts[library][i]) for library in LIBRARIES) + " |"
        for i, verdict in enumerate(MEANING)
    ]
    return "\n".join(
        [
            "# Conformance: every privacy trap, run",
            "",
            f"Printed by `benchmarks/conformance.py` on {document['date']}, {machine}:",
            f"{versions}.",
            "",
            "Each cell was computed by running that library as its documentation says; the checks are in",
            "`benchmarks/traps/`. Opacus is run in its modes hooks, functorch, ew (expanded weights) and ghost.",
            "Flower's DP strategies protect a client's whole update, not a record, so rows about records do not apply",
            "to them. Where a clipped sum is off and one record adds at most 1.00 C, the gradient is wrong and still",
            "private; where one record adds more than C, it is neither right nor private.",
            "",
            *[f"- **{verdict}**: {meaning}" for verdict, meaning in MEANING.items()],
            "",
            "| trap | Opacus | Flower | Siloweave |",
            "|---|---|---|---|",
            *rows,
            "",
            "| cells | Opacus | Flower | Siloweave |",
            "|---|---|---|---|",
            *totals,
            "",
            "## Evidence",
            *evidence,
            "",
        ]
    )


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--markdown", type=Path, help="also write the page")
    parser.add_argument("--traps", nargs="*", choices=TITLES, default=list(TITLES), help="only these")
    arguments = parser.parse_args()
    found = {library: run_library(library, arguments.traps) for library in LIBRARIES}
    traps = {
        trap: {
            library: {"verdict": found[library][trap].verdict, "evidence": found[library][trap].evidence}
            for library in LIBRARIES
        }
        for trap in arguments.traps
    }
    document = {**described(), "traps": traps}
    arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    page = markdown(document)
    if arguments.markdown:
        arguments.markdown.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
