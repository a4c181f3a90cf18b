"""Flower's DP strategies and mods. Their unit is a client, whose whole update is clipped."""

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.serverapp import SamplingMethod

from traps import masks
from traps.cell import Cell, Check, absent, first_line, judged, of_modes
from traps.flower_rounds import (
    ADAPTIVE,
    CLIP,
    FIXED,
    SIGMA,
    SIZE,
    accountant,
    constant,
    fed_avg,
    fixed,
    one_round,
)
from traps.layers import LAYERS
from traps.randomness import correlation, unrelated


def largest() -> Cell:
    """Four clients send 1, 100, 1 and 1: what the second adds to the sum."""
    found = {}
    for where, strategy in FIXED.items():
        total, _ = one_round(strategy(fed_avg(2), 1e-9, CLIP, 2), [constant(1e-3), constant(100.0)])
        found[where] = (np.linalg.norm(total * 2 - 1e-3) / CLIP).item()
    evidence = ", ".join(f"{where} {value:.3f} C a client" for where, value in found.items())
    return judged(max(found.values()) <= 1.001, evidence)


def non_finite() -> Cell:
    cells = {}
    for where in FIXED:
        total, _ = one_round(fixed(4, where), [constant(1.0), constant(np.nan), constant(1.0), constant(1.0)])
        share = 0.0 if total is None else np.isfinite(total).mean()
        cells[where] = judged(total is None or share == 1, f"one NaN client of 4 leaves {share:.0%} finite")
    return of_modes(cells)


def noise() -> Cell:
    cells = {}
    for where in FIXED:
        first, second = (torch.from_numpy(one_round(fixed(4, where), [constant(1e-9, SIZE)] * 4)[0]) for _ in range(2))
        ratio = first.std().item() * 4 / (SIGMA * CLIP)
        evidence = f"{ratio:.4f} of sigma C, correlation of two rounds {correlation(first, second):.4f}"
        cells[f"fixed, {where}"] = judged(abs(ratio - 1) < 0.01 and unrelated(first, second), evidence)
    for where, kind in ADAPTIVE.items():
        strategy = kind(fed_avg(100), SIGMA, 100, initial_clipping_norm=CLIP)
        total, _ = one_round(strategy, [constant(1.0, 50_000)] * 100)  # every client is clipped
        ratio = (total - total.mean()).std().item() * 100 / (strategy.noise_multiplier * CLIP)
        evidence = f"{ratio:.3f} of sigma times the norm that the round was clipped to"
        cells[f"adaptive, {where}"] = judged(ratio > 0.99, evidence)
    return of_modes(cells)


def shuffling() -> Cell:
    try:
        FIXED["server side"](fed_avg(4), SIGMA, CLIP, 4, accountant=accountant(SamplingMethod.POISSON))
    except ValueError as error:
        return Cell("refuses", first_line(error))
    return Cell("fails", "a fixed number of clients is sampled and accounted as Poisson")


def two_rounds() -> Any:
    strategy = fixed(4, accounted=True)
    for number in (1, 2):
        one_round(strategy, [constant(1.0)] * 4, number=number)
    return strategy


def resume() -> Cell:
    import inspect

    from flwr.serverapp.strategy import Strategy

    before, after = two_rounds().privacy_spent().num_releases, fixed(4, accounted=True).privacy_spent().num_releases
    start = [name for name in inspect.signature(Strategy.start).parameters if "round" in name]
    evidence = (
        f"round arguments of Strategy.start: {start}; {before} releases before the restart, {after} accounted after"
    )
    return judged(after >= before, evidence)


def other_adapter() -> Cell:
    def noise_of(value: float, seed: int | None) -> torch.Tensor:
        if seed is not None:
            np.random.seed(seed)
        return torch.from_numpy(one_round(fixed(4), [constant(value, SIZE)] * 4)[0])

    free = correlation(noise_of(0.0001, None), noise_of(0.0002, None))
    seeded = correlation(noise_of(0.0001, 0), noise_of(0.0002, 0))
    return Cell("n/a", f"no requests; correlation of two runs' noise {free:.4f}, after numpy.random.seed {seeded:.4f}")


KILLED = """
import os, signal
from traps.flower import two_rounds
print(two_rounds().privacy_spent().num_releases, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed() -> Cell:
    done = python(KILLED)
    before, after = int(done.stdout), fixed(4, accounted=True).privacy_spent().num_releases
    evidence = f"{before} releases accounted before the kill, {after} after: nothing saves the accountant's state"
    return judged(after >= before, f"{evidence} unless the app does")


def two_processes() -> Cell:
    state = two_rounds().accountant.state_dict()
    copies = [accountant() for _ in range(2)]
    for copy in copies:
        copy.load_state_dict(state)
        strategy = FIXED["server side"](fed_avg(4), SIGMA, CLIP, 4, accountant=copy)
        one_round(strategy, [constant(1.0)] * 4, number=3)
    counted = max(copy.num_releases for copy in copies)
    return judged(
        counted >= 4, f"2 releases, then 1 in each of two continuations of one state: {counted} of 4 accounted"
    )


def edited() -> Cell:
    state = two_rounds().accountant.state_dict()
    state["compositions"] = state["compositions"][:1]
    again = accountant()
    try:
        again.load_state_dict(state)
    except ValueError as error:
        return Cell("refuses", first_line(error))
    return Cell("fails", f"a state of 2 releases with one deleted: it loads, {again.num_releases} accounted")


def restored() -> Cell:
    strategy = fixed(4, accounted=True)
    old = strategy.accountant.state_dict()
    one_round(strategy, [constant(1.0)] * 4)
    again = accountant()
    again.load_state_dict(old)
    return judged(again.num_releases >= 1, f"an older state loads, {again.num_releases} of 1 accounted")


@contextlib.contextmanager
def warnings_logged() -> Iterator[list[str]]:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda entry: said.append(entry.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("flwr")
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.ERROR)


def dropout() -> Cell:
    cells = {}
    for name, accounted in (("no accountant", False), ("with one", True)):
        with warnings_logged() as said:
            total, _ = one_round(fixed(4, accounted=accounted), [constant(1e-9, SIZE)] * 3 + [None])
        if total is None:
            cells[name] = Cell("refuses", "a missing client cancels the round's release")
        else:
            ratio = total.std().item() * 3 / (SIGMA * CLIP)
            warned = any("could impact the differential privacy" in line for line in said)
            evidence = f"1 of 4 missing: noise on the sum is {ratio:.3f} of sigma C, a log line warns: {warned}"
            cells[name] = judged(ratio > 0.99, evidence, "warns" if warned else "fails")
    return of_modes(cells)


def weights() -> Cell:
    cells = {}
    for name, accounted in (("no accountant", False), ("with one", True)):
        try:
            updates = [constant(0.0 + 1e-9)] * 3 + [constant(CLIP / 2)]  # the last has the norm C
            strategy = fixed(4, accounted=accounted)
            strategy.noise_multiplier = 1e-9
            total, _ = one_round(strategy, updates, weights=[1, 1, 1, 97])
        except ValueError as error:
            cells[name] = Cell("refuses", first_line(error))
        else:
            share = np.linalg.norm(total) / CLIP * 4
            evidence = f"with 97 of 100 examples a client moves the mean by {share:.2f} C / n, under noise for 1"
            cells[name] = judged(share <= 1.001, evidence)
    return of_modes(cells)


def number_of_records() -> Cell:
    """The same updates and the same noise; one client has one record less."""
    cells = {}
    for name, accounted in (("no accountant", False), ("with one", True)):
        shown = []
        try:
            for count in (120, 119):
                np.random.seed(0)
                updates = [constant(0.5), constant(1.0)]
                shown.append(one_round(fixed(2, accounted=accounted), updates, weights=[120, count])[0])
        except ValueError as error:
            cells[name] = Cell("refuses", first_line(error))
        else:
            moved = float(np.abs(shown[0] - shown[1]).max())
            cells[name] = judged(
                moved == 0, f"replies carry num-examples; one record less moves the mean by {moved:.0e}"
            )
    return of_modes(cells)


FAILING = """
import time
import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation

client, server = ClientApp(), ServerApp()

@client.train()
def train(message, context):
    raise ValueError("record 17: patient Doe has no age")

@server.main()
def main(grid, context):
    content = RecordDict({"arrays": ArrayRecord([np.zeros(2, np.float32)])})
    while not list(grid.get_node_ids()):
        time.sleep(0.1)
    message = Message(content, message_type="train", dst_node_id=next(iter(grid.get_node_ids())))
    for reply in grid.send_and_receive([message]):
        print("REASON", repr(reply.error.reason), flush=True)

run_simulation(server_app=server, client_app=client, num_supernodes=1,
               backend_config={"client_resources": {"num_cpus": 1}})
"""


def refusals() -> Cell:
    done = python(FAILING)
    reasons = [line for line in done.stdout.splitlines() if line.startswith("REASON")]
    if not reasons:
        raise RuntimeError(done.stderr[-2000:])
    leaked = "Doe" in reasons[0]
    return judged(
        not leaked, f"the text of a client's error, with the record's content in it, reaches the server: {leaked}"
    )


def python(script: str) -> subprocess.CompletedProcess[str]:
    places = os.pathsep.join(str(Path(place).absolute()) for place in sys.path)
    environment = {**os.environ, "PYTHONPATH": places, "FLWR_TELEMETRY_ENABLED": "0"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "script.py").write_text(script)
        return subprocess.run(
            [sys.executable, "-W", "ignore", "script.py"],
            cwd=folder,
            env={**environment, "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_HOME": folder},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )


def personal_state() -> Cell:
    """A client's training loss, which its own state made, in a round under DP."""
    _, metrics = one_round(fixed(4), [constant(1.0)] * 4, loss=1.25)
    said = "evaluation metrics are not included" in (FIXED["server side"].__doc__ or "").replace("\n    ", " ")
    exact = metrics is not None and metrics.get("loss") == 1.25
    evidence = f"metrics in replies leave without noise: {exact}; the docstring says that they aren't accounted: {said}"
    return judged(not exact, evidence, "warns" if said else "fails")


def generator() -> Cell:
    rounds = []
    for _ in range(2):
        np.random.seed(0)
        rounds.append(one_round(fixed(4), [constant(1.0)] * 4)[0])
    same = bool(np.array_equal(*rounds))
    kind = np.random.get_state(legacy=False)["bit_generator"]
    return judged(not same, f"numpy's global {kind}; numpy.random.seed repeats all noise: {same}")


def zero_update() -> Cell:
    cells = {}
    for where in FIXED:
        try:
            total, _ = one_round(fixed(4, where), [constant(0.0)] * 4)
        except ArithmeticError as error:
            cells[where] = Cell("stops", first_line(error))
        else:
            cells[where] = judged(bool(np.isfinite(total).all()), "aggregated")
    return of_modes(cells)


NO_RECORDS = absent("clips a client's whole update; records are not seen")
NO_RANKS = absent("one server process adds the noise")
CELLS: dict[str, Check] = {
    **{f"sum_{name}": NO_RECORDS for name in LAYERS},
    "largest": largest,
    "micro_batches": NO_RECORDS,
    "hostile_adapters": NO_RECORDS,
    "non_finite": non_finite,
    "noise": noise,
    "world_sizes": NO_RANKS,
    "uneven_ranks": NO_RANKS,
    "empty_batch": absent("no Poisson sampling of clients"),
    "sampling": absent("no Poisson sampling of clients"),
    "shuffling": shuffling,
    "resume": resume,
    "other_adapter": other_adapter,
    "killed": killed,
    "two_processes": two_processes,
    "edited": edited,
    "restored": restored,
    "without_wal": absent("no ledger file"),
    "dropout": dropout,
    "weights": weights,
    "number_of_records": number_of_records,
    "refusals": refusals,
    "personal_state": personal_state,
    "generator": generator,
    "mask_keys": masks.flower,
    "zero_update": zero_update,
    "client_sampling": absent("no record-level event"),
}
