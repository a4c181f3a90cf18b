"""Opacus alone, used as its documentation says."""

import os
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from traps import hostile, ranks
from traps.cell import Cell, Check, absent, first_line, judged, of_modes
from traps.engine import Averaged, wide
from traps.layers import (
    LAYERS,
    OPACUS_MODES,
    RIGHT,
    largest_record,
    median_norm,
    opacus_layer,
    opacus_sum,
    per_record_loop,
    records,
    relative_error,
)
from traps.opacus_run import MAX_GRAD_NORM, SIGMA, Run
from traps.randomness import correlation, is_poisson, sampling_figures, unrelated

warnings.filterwarnings("ignore")


def largest() -> Cell:
    model, x_B = LAYERS["linear"].model(), records()
    norm = median_norm(model, x_B) / 2
    found = {}
    for mode in OPACUS_MODES:
        found[mode] = largest_record(lambda one, mode=mode: opacus_sum(model, one, mode, norm), x_B) / norm
    return judged(max(found.values()) <= 1, ", ".join(f"{mode} {value:.3f} C" for mode, value in found.items()))


def micro_batches() -> Cell:
    model, x_B = LAYERS["linear"].model(), records()
    norm = median_norm(model, x_B)
    expected = per_record_loop(model, x_B, norm)
    cells = {}
    for mode in OPACUS_MODES:
        worst = max(relative_error(opacus_sum(model, x_B, mode, norm, size), expected) for size in (32, 8, 1))
        cells[mode] = judged(worst < RIGHT, f"{worst:.0e}")
    return of_modes(cells)


def hostile_adapters() -> Cell:
    cells = {}
    for mode in OPACUS_MODES:
        try:
            found = hostile.opacus(mode)
        except (RuntimeError, NotImplementedError) as error:
            cells[mode] = Cell("stops", first_line(error))
            continue
        shown = ", ".join(f"{one.adapter} {one.moved:.4g} C, of others {one.beside_its_own:.2g} C" for one in found)
        cells[mode] = judged(all(one.moved <= 1.001 for one in found), shown)
    return of_modes(cells)


def non_finite() -> Cell:
    run = Run(poisson_sampling=False)
    x_B = run.data.tensors[0][:10]
    before = run.weights()
    run.optimizer.zero_grad()
    losses = run.model(x_B).square().mean(dim=1)
    (losses * torch.tensor([float("inf")] + [1.0] * 9)).mean().backward()
    run.optimizer.step()
    share = (run.weights() - before).isfinite().float().mean().item()
    return judged(share == 1, f"one inf record of 10 leaves {share:.0%} of the weights finite")


def noise_only(steps: int = 1, **options: Any) -> list[torch.Tensor]:
    """Noise of each step on the sum, in units of sigma * C: every loss is 0."""
    run = Run(wide(), poisson_sampling=False, **options)
    return [run.step(run.data.tensors[0][:10], scale=0.0) * 10 / (SIGMA * MAX_GRAD_NORM) for _ in range(steps)]


def noise() -> Cell:
    first, second = noise_only(2)
    ratio = first.std().item()
    half = len(first) // 2
    independent = unrelated(first, second) and unrelated(first[:half], first[half : 2 * half])
    return judged(
        abs(ratio - 1) < 0.01 and independent,
        f"{ratio:.4f} of sigma C over {len(first):,} values; correlation of two steps {correlation(first, second):.4f}",
    )


def world_sizes() -> Cell:
    found = {size: ranks.noise(size) for size in (1, 2, 4)}
    same = all(abs(ratio - 1) < 0.01 for ratio in found.values())
    return judged(same, ", ".join(f"{size} ranks: {ratio:.4f} of sigma C" for size, ratio in found.items()))


def uneven_ranks() -> Cell:
    steps, problem = ranks.epochs(2)
    evidence = f"steps of each rank in 4 epochs of 6: {steps}; {problem or 'both ended'}"
    return judged(not problem and len(set(steps)) == 1, evidence, "stops" if problem else "fails")


def empty_batch() -> Cell:
    run = Run(num_records=12, batch_size=2)
    for _ in range(20):
        for x_B, _ in run.loader:
            before = run.steps_accounted()
            lost = run.step(x_B) if len(x_B) == 0 else None
            if lost is not None:
                moved, counted = bool(lost.any()), run.steps_accounted() - before
                return judged(moved and counted == 1, f"one process: noise added: {moved}, steps accounted: {counted}")
            run.step(x_B)
    return Cell("fails", "no empty batch in 120 steps of 12 records at rate 1/6")


def inclusion(**options: Any) -> torch.Tensor:
    run = Run(num_records=100, batch_size=5, **options)
    rows = [index_B for _ in range(50) for _, index_B in run.loader]
    found = torch.zeros(len(rows), 100)
    for step, index_B in enumerate(rows):
        found[step, index_B] = 1
    return found


def sampling() -> Cell:
    found = inclusion()
    figures = sampling_figures(found, 0.05)
    return judged(is_poisson(figures, len(found)), figures_line(figures, len(found)))


def figures_line(figures: dict[str, float], steps: int) -> str:
    return (
        f"{steps} steps: share {figures['rate']:.1f} and largest pair {figures['pairs']:.1f} standard errors off, "
        f"variance of the size {figures['size']:.2f} of the binomial's"
    )


def shuffling() -> Cell:
    from opacus import PrivacyEngine

    epsilons = []
    for poisson in (True, False):
        run = Run(poisson_sampling=poisson)
        for x_B in run.data.tensors[0].split(10):
            run.step(x_B)
        epsilons.append(run.engine.get_epsilon(1e-5))
    found = inclusion(poisson_sampling=False)
    figures = sampling_figures(found, 0.05)
    sound = is_poisson(figures, len(found)) or epsilons[0] != epsilons[1]
    said = "doesn't fit the assumptions" in (PrivacyEngine.make_private.__doc__ or "")
    evidence = (
        f"poisson_sampling=False: variance of the size {figures['size']:.2f} of the binomial's, epsilon the same "
    )
    return judged(sound, evidence + f"{epsilons[1]:.2f}; its docstring says so: {said}", "warns" if said else "fails")


def resume() -> Cell:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        torch.manual_seed(0)
        run, seen = Run(poisson_sampling=False), []
        for number in range(4):
            seen.append(run.step(run.data.tensors[0][:10]))
            if number == 1:
                run.engine.save_checkpoint(path=path, module=run.model, optimizer=run.optimizer)
        again = Run(poisson_sampling=False)
        again.engine.load_checkpoint(path=path, module=again.model, optimizer=again.optimizer)
        seen += [again.step(again.data.tensors[0][:10]) for _ in range(2)]
    same = all(torch.equal(a, b) for a, b in zip(seen[2:4], seen[4:], strict=True))
    counted = again.steps_accounted()
    return judged(
        same, f"steps 3 and 4 repeated with other noise; {len(seen)} noised steps were seen, {counted} are accounted"
    )


def other_adapter() -> Cell:
    """What stands in for a request: a second training of the same script, from other weights."""
    free = [noise_only()[0] for _ in range(2)]
    given = [noise_only(noise_generator=torch.Generator())[0] for _ in range(2)]
    evidence = f"no requests; correlation of two runs' noise {correlation(*free):.4f}, with noise_generator="
    return Cell("n/a", evidence + f"torch.Generator() {correlation(*given):.4f}")


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from traps.opacus_run import Run
run = Run(poisson_sampling=False)
for number in range(4):
    run.step(run.data.tensors[0][:10])
    print("released", flush=True)
    if number == 1:
        run.engine.save_checkpoint(path=Path(sys.argv[1]), module=run.model, optimizer=run.optimizer)
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed() -> Cell:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(path)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        if done.returncode != -signal.SIGKILL:
            raise RuntimeError(done.stderr)
        run = Run()
        run.engine.load_checkpoint(path=path, module=run.model)
    released = done.stdout.count("released")
    return judged(
        run.steps_accounted() >= released,
        f"{released} noised steps before the kill, {run.steps_accounted()} in the checkpoint that is continued",
    )


def two_processes() -> Cell:
    """Two engines continue one checkpoint and save to it, as two processes would."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        first = Run(poisson_sampling=False)
        first.engine.save_checkpoint(path=path, module=first.model)
        runs = [Run(poisson_sampling=False) for _ in range(2)]
        for run in runs:
            run.engine.load_checkpoint(path=path, module=run.model)
        for run in runs:
            for _ in range(3):
                run.step(run.data.tensors[0][:10])
            run.engine.save_checkpoint(path=path, module=run.model)
        last = Run()
        last.engine.load_checkpoint(path=path, module=last.model)
    return judged(last.steps_accounted() >= 6, f"2 times 3 steps on one checkpoint, {last.steps_accounted()} accounted")


def edited() -> Cell:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        run = Run(poisson_sampling=False)
        for _ in range(4):
            run.step(run.data.tensors[0][:10])
        run.engine.save_checkpoint(path=path, module=run.model)
        content = torch.load(path, weights_only=False)
        state = content["privacy_accountant_state_dict"]
        state["history"] = [(sigma, rate, 1) for sigma, rate, _ in state["history"]]
        torch.save(content, path)
        again = Run()
        try:
            again.engine.load_checkpoint(path=path, module=again.model)
        except Exception as error:
            return Cell("refuses", first_line(error))
    return Cell("fails", f"4 steps edited to 1 in a checkpoint: it loads, {again.steps_accounted()} accounted")


def restored() -> Cell:
    with tempfile.TemporaryDirectory() as folder:
        old, path = Path(folder) / "old.pt", Path(folder) / "checkpoint.pt"
        run = Run(poisson_sampling=False)
        run.engine.save_checkpoint(path=old, module=run.model)
        for _ in range(4):
            run.step(run.data.tensors[0][:10])
        run.engine.save_checkpoint(path=path, module=run.model)
        old.replace(path)
        again = Run()
        again.engine.load_checkpoint(path=path, module=again.model)
    return judged(again.steps_accounted() >= 4, f"an older checkpoint loads, {again.steps_accounted()} of 4 accounted")


def number_of_records() -> Cell:
    sizes = {count: Run(num_records=count, batch_size=100).optimizer.expected_batch_size for count in (1000, 999)}
    return judged(
        len(set(sizes.values())) == 1,
        "normaliser with " + ", ".join(f"{count} records: {size}" for count, size in sizes.items()),
    )


def buffers() -> Cell:
    try:
        Run(nn.Sequential(Averaged(nn.Embedding(10, 4)), nn.BatchNorm1d(4)))
    except Exception as error:
        return Cell("refuses", "BatchNorm: " + first_line(error))
    return Cell("fails", "BatchNorm's running statistics are trained without noise")


def generator() -> Cell:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(0)
        first = noise_only()[0]
        torch.manual_seed(0)
        again = noise_only()[0]
    warned = any("Secure RNG turned off" in str(one.message) for one in caught)
    try:
        Run(secure_mode=True)
        secure = "secure_mode works"
    except ImportError as error:
        secure = "secure_mode: " + first_line(error, 70)
    predicted = torch.equal(first, again)
    evidence = f"torch.manual_seed repeats all noise: {predicted}; a warning says so: {warned}; {secure}"
    return judged(not predicted, evidence, "warns" if warned else "fails")


def zero_update() -> Cell:
    run = Run(noise_multiplier=0.0, poisson_sampling=False)
    lost = run.step(run.data.tensors[0][:10], scale=0.0)
    return judged(bool((lost == 0).all()), f"a zero gradient moves the weights by {lost.norm().item():g}")


NO_CLIENTS = absent("one process or gang on one dataset; no clients")
CELLS: dict[str, Check] = {
    **{f"sum_{name}": lambda layer=layer: of_modes(opacus_layer(layer)) for name, layer in LAYERS.items()},
    "largest": largest,
    "micro_batches": micro_batches,
    "hostile_adapters": hostile_adapters,
    "non_finite": non_finite,
    "noise": noise,
    "world_sizes": world_sizes,
    "uneven_ranks": uneven_ranks,
    "empty_batch": empty_batch,
    "sampling": sampling,
    "shuffling": shuffling,
    "resume": resume,
    "other_adapter": other_adapter,
    "killed": killed,
    "two_processes": two_processes,
    "edited": edited,
    "restored": restored,
    "without_wal": absent("a checkpoint is one file"),
    "dropout": NO_CLIENTS,
    "weights": NO_CLIENTS,
    "number_of_records": number_of_records,
    "refusals": absent("nobody asks from outside: there is no policy and no reply"),
    "personal_state": buffers,
    "generator": generator,
    "mask_keys": absent("one process: no updates of others to add"),
    "zero_update": zero_update,
    "client_sampling": NO_CLIENTS,
}
