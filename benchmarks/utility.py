"""What noise costs small silos: each alone, each with all of its noise, together, or with all data in one place.

All ways have the same model, start, records, samples, steps, learning rate, epsilon and delta, and take plain DP-SGD
steps. Federations are the product's own over the local grid: silos, ledgers, rounds, and secure sums where silos make
the noise together. Data in one place is trained on by Opacus. A frozen body reads a text once, whoever asks again.

python benchmarks/utility.py --study sentiment --model FOLDER --data FOLDER --json utility.json
python benchmarks/utility.py --study plays --model FOLDER --json utility.json
python benchmarks/utility.py --json utility.json --plot docs/utility.svg

Cells that are in the file already are not measured again, and one that is cut off is measured anew.
"""

import argparse
import json
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from figures import setting
from utility_data import DELTA, STUDIES, Records, Study, settings_of

os.environ |= {"RAY_worker_niceness": "0"}  # or its process waits for all else on a busy machine
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])  # of Ray's

import numpy as np
import torch

from cluster.report.plots import ACCENT, INK, MUTED, new_figure, svg
from cluster.runtime.session import ray_session
from configs.events import read_events
from configs.schema.schema import RunConfig
from configs.storage.layout import EVENTS
from federated.adapters.arrays import Arrays, from_bytes
from federated.adapters.warm_model import initial_adapter, put_on
from federated.coordinator import round_commits as commits
from federated.coordinator.parties import Parties
from federated.coordinator.rounds import run_federation
from federated.identity.trust import coordinator_signer
from federated.silo.local_training import LocalSettings, PrivateUpdate
from federated.silo.silo import Silo
from federated.simulation.local_grid import LocalGrid
from federated.simulation.public_silo import PublicSilo, own_signer
from federated.simulation.simulation import simulated_silos
from privacy.accounting.accountant import calibrate
from privacy.accounting.schedule import Schedule
from privacy.mechanism.streams import SEED_BYTES, Streams
from privacy.plan_from_settings import plan_terms
from trainer.models.adapters import trainable

LIBRARIES = ("siloweave", "torch", "transformers", "peft", "opacus", "ray", "numpy", "dp-accounting")
EPSILONS = (1.0, 2.0, 4.0, 8.0)
NO_DP = ("base model", "no DP")
WAYS = (*NO_DP, "alone", "record", "distributed", "pooled")
DRAWN = {"pooled": (INK, "-"), "distributed": (ACCENT, "-"), "record": (MUTED, "--"), "alone": (MUTED, ":")}
MICRO_BATCH, BETWEEN = 32, "|"


def opened(folder: str, read: str, node: str) -> Any:
    """A silo in the process of Ray's that has all of a study's; one without DP where a plan says its batches."""
    from utility_data import read_once

    if read:
        read_once(Path(read))
    cell, name = node.split(BETWEEN)
    config, trusted, plan, roster = pickle.loads((Path(folder) / cell / "opener").read_bytes())[name]
    return PublicSilo(config, trusted, plan) if plan else Silo(config, trusted, roster=roster)


class Own:
    """What one federation sees of the grid: its own silos."""

    def __init__(self, grid: LocalGrid, nodes: list[int]) -> None:
        self.push_messages, self.pull_messages, self._nodes = grid.push_messages, grid.pull_messages, nodes

    def get_node_ids(self) -> list[int]:
        """One node for each of its silos."""
        return self._nodes


class Federations:
    """All federations of a study over one local grid, whose process starts once; each has its own keys and ledgers."""

    def __init__(self, ray: Any, records: Records, cells: Sequence[str], folder: Path) -> None:
        self.records, self.folder = records, folder
        read = str(records.read) if records.read else ""
        nodes = sorted(f"{cell}{BETWEEN}{silo}" for cell in cells for silo in records.silos)
        self.grid = LocalGrid(ray, partial(opened, str(folder), read), nodes, workers=1, threads=1, kept=True)
        self._nodes = dict(zip(self.grid.get_node_ids(), nodes, strict=True))

    def figures(self, cell: str, config: RunConfig, *, with_dp: bool) -> dict[str, float]:
        """A federation from its first round to its certificate."""
        place = self.folder / cell
        federated = config.federated.model_copy(update={"state_dir": str(place / "state")})
        config = config.model_copy(update={"federated": federated})
        silos = simulated_silos(config, self.records.model)
        signer, roster = coordinator_signer(place / "state"), None
        if config.federated.secure_aggregation:
            roster = {name: own_signer(silo).public_key for name, silo in silos.items()}
        given = frozenset({signer.public_key}), None if with_dp else plan_terms(config), roster
        openers = {name: (silo, *given) for name, silo in silos.items()}
        (place / "opener").write_bytes(pickle.dumps(openers))
        grid = Own(self.grid, [at for at, node in self._nodes.items() if node.split(BETWEEN)[0] == cell])
        parties, run = Parties(signer, len(silos)), place / "run"
        run_federation(grid, config, self.records.model, run, parties, lambda _: None, certify=with_dp)
        found = commits.all_rounds(run)
        rounds = [event for event in read_events(run / EVENTS) if event["event"] == "round"]
        if found[-1].round_number != config.federated.rounds or any(
            len(one["answered"]) < len(silos) for one in rounds
        ):
            raise SystemExit(f"{cell}: a round is missing, or a silo in it; see {run / EVENTS}")
        seconds = float(np.median([one["seconds"] for one in rounds]))
        return {**self.records.figures(from_bytes(found[-1].adapter)), "seconds_a_round": seconds}


def alone(config: RunConfig, records: Records) -> dict[str, float]:
    """Each silo takes all steps by itself, and is asked about all silos' records: the mean over silos."""
    terms = plan_terms(config).model_copy(update={"rounds": 1, "steps_per_round": config.federated.rounds})
    local = LocalSettings(config.federated.learning_rate, "sgd", MICRO_BATCH, "bookkeeping")
    found = []
    for units in records.silos.values():
        start, model = initial_adapter(config, records.model), records.warm()
        update = PrivateUpdate(terms.bind(len(units)), model, records.task, start, local)
        moved = update.run(Streams(os.urandom(SEED_BYTES), "00" * 32), units)
        found.append(records.figures({name: value + moved[name] for name, value in start.items()}))
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def pooled(config: RunConfig, records: Records, seed: int) -> dict[str, float]:
    """All records in one place: Opacus' per-sample gradients, clipping and noise, over Poisson samples."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    units = [unit for silo in records.silos.values() for unit in silo]
    rate, steps = config.privacy.sampling_rate, config.federated.rounds
    model, chance = records.warm(), np.random.default_rng(seed)
    put_on(model.train(), initial_adapter(config, records.model))
    torch.manual_seed(seed)
    module = GradSampleModule(model, loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(list(trainable(model).values()), lr=config.federated.learning_rate),
        noise_multiplier=calibrate(config.privacy.epsilon, DELTA, Schedule(steps, rate, 1.0)),
        max_grad_norm=config.privacy.max_grad_norm,
        expected_batch_size=rate * len(units),
        loss_reduction="mean",
    )
    for _ in range(steps):
        batch = [units[place][0] for place in np.flatnonzero(chance.random(len(units)) < rate)]
        records.task.record_losses(model, records.task.collate(batch)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter: Arrays = {name: value.detach().numpy().copy() for name, value in trainable(model).items()}
    module.remove_hooks()
    for parameter in model.parameters():
        for name in ("grad_sample", "summed_grad"):
            if hasattr(parameter, name):
                delattr(parameter, name)
    return records.figures(adapter)


def measured(
    federations: Federations, study: Study, cell: tuple[str, float, int], records: Records
) -> dict[str, float]:
    way, epsilon, seed = cell
    config = settings_of(study, records, epsilon or 1.0, seed, together=way == "distributed")
    match way:
        case "base model":
            return records.figures(initial_adapter(config, records.model))
        case "alone":
            return alone(config, records)
        case "pooled":
            return pooled(config, records, seed)
    if way == "no DP":
        settings = config.federated.model_copy(update={"learning_rate": study.rate_without})
        config = config.model_copy(update={"federated": settings})
    return federations.figures(_folder(cell), config, with_dp=way != "no DP")


def _folder(cell: tuple[str, float, int]) -> str:
    return f"{cell[0].replace(' ', '-')}-{cell[1]:g}-{cell[2]}"


def cells(ways: list[str], epsilons: list[float], seeds: list[int]) -> list[tuple[str, float, int]]:
    """Way, epsilon (0: none) and seed; all of a seed before the next, so that a table of fewer seeds is whole."""
    return [
        (way, epsilon, seed) for seed in seeds for way in ways for epsilon in ((0.0,) if way in NO_DP else epsilons)
    ]


def measure(arguments: argparse.Namespace, document: dict[str, Any]) -> None:
    records = Records(STUDIES[arguments.study], arguments.model, arguments.data, arguments.work)
    sizes = {name: len(units) for name, units in records.silos.items()}
    said = json.loads(json.dumps({**STUDIES[arguments.study].said(), "silos": sizes}))
    kept = document["studies"].setdefault(arguments.study, {"setting": said, "cells": {}})
    if kept["setting"] != said:
        raise SystemExit(f"{arguments.json} has cells of other settings; give another file")
    study, wanted = STUDIES[arguments.study], cells(arguments.only, arguments.epsilon, arguments.seeds)
    missing = {_named(cell): cell for cell in wanted if _named(cell) not in kept["cells"]}
    cluster = settings_of(study, records, 1.0, 0, together=False).cluster
    with ray_session(cluster, 1) as ray, tempfile.TemporaryDirectory() as folder:
        federations = Federations(ray, records, [_folder(cell) for cell in missing.values()], Path(folder))
        for name, cell in missing.items():
            began = time.perf_counter()
            found = measured(federations, study, cell, records)
            kept["cells"][name] = {**found, "seconds": time.perf_counter() - began}
            print(f"{arguments.study}, {name}: {kept['cells'][name]}", file=sys.stderr, flush=True)
            partly = arguments.json.with_suffix(".part")
            partly.write_text(json.dumps(document, indent=2) + "\n")
            partly.replace(arguments.json)


def _named(cell: tuple[str, float, int]) -> str:
    return f"{cell[0]}/{cell[1]:g}/{cell[2]}"


def table(study: dict[str, Any], main: str) -> dict[str, dict[str, list[float]]]:
    """The main figure of each seed, by way and epsilon."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, figures in study["cells"].items():
        way, epsilon, _ = name.rsplit("/", 2)
        found.setdefault(way, {}).setdefault(epsilon, []).append(figures[main])
    return found


def shown(document: dict[str, Any]) -> None:
    for name, study in document["studies"].items():
        found = table(study, STUDIES[name].main)
        for way in WAYS:
            for epsilon, values in sorted(found.get(way, {}).items()):
                ceiling = found.get("pooled", {}).get(epsilon)
                beside = f", {np.mean(values) / np.mean(ceiling) - 1:+.2%} beside pooled" if ceiling else ""
                spread = f"{np.mean(values):.4f}, spread {np.std(values):.4f} ({min(values):.4f} to {max(values):.4f})"
                print(f"{name}, {way}, epsilon {epsilon}: {spread}, {len(values)} seeds{beside}")


def plot(document: dict[str, Any]) -> str:
    """Quality against epsilon, a panel for each study: means, and bars from the worst seed to the best."""
    figure, panels = new_figure(width=4.6, height=3.2, panels=len(document["studies"]))
    for panel, (name, study) in zip(panels, document["studies"].items(), strict=True):
        found = table(study, STUDIES[name].main)
        for way, (color, line) in DRAWN.items():
            at = sorted(found.get(way, {}), key=float)
            means = np.array([np.mean(found[way][epsilon]) for epsilon in at])
            ends = [[min(found[way][epsilon]) for epsilon in at], [max(found[way][epsilon]) for epsilon in at]]
            bars = np.abs(np.array(ends) - means)
            panel.errorbar(list(map(float, at)), means, bars, color=color, linestyle=line, label=way, capsize=2)
        for way, line in zip(NO_DP, ("-.", (0, (1, 3))), strict=True):
            if way in found:
                panel.axhline(np.mean(found[way]["0"]), color=MUTED, linewidth=0.8, linestyle=line, label=way)
        panel.set_xscale("log", base=2)
        panel.set_xticks(EPSILONS, [f"{epsilon:g}" for epsilon in EPSILONS])
        panel.set(title=STUDIES[name].title, xlabel="epsilon", ylabel=STUDIES[name].label)
        panel.legend(fontsize=7, frameon=False)
    return svg(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, help="without one, what is in the file is shown")
    parser.add_argument("--model", type=Path, help="what `siloweave import` or `export` has made")
    parser.add_argument("--data", type=Path, help="folder of the datasets, for the study that needs them")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epsilon", type=float, nargs="+", default=list(EPSILONS))
    parser.add_argument("--work", type=Path, help="folder for what a frozen body has read; default: beside the figures")
    parser.add_argument("--plot", type=Path, help="writes the figures as SVG")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.work = arguments.work or arguments.json.absolute().parent
    torch.set_num_threads(1)
    document: dict[str, Any] = {**setting(LIBRARIES), "delta": DELTA, "studies": {}}
    if arguments.json.exists():
        document["studies"] = json.loads(arguments.json.read_text())["studies"]
    if arguments.study:
        measure(arguments, document)
    shown(document)
    if arguments.plot:
        arguments.plot.write_text(plot(document))


if __name__ == "__main__":
    main()
