"""``siloweave pretrain --verify-resume``: the same losses at every number of ranks, across kills, but for rounding.

A single rank trains a few steps without interruption. A second run does the same steps in legs of different numbers of
ranks: each is killed a few steps after a commit, and the next one goes on from there. Both run beside the run itself,
on its corpus and with its settings, and are deleted afterwards.
"""

import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cluster.runtime.gang import run_gang
from configs.errors import InputError
from configs.events import Listener
from configs.schema.schema import RunConfig
from configs.schema.stages import TrainingStage
from configs.storage.layout import RunFiles
from configs.storage.manifests import require_manifest
from trainer.checkpoints.checkpoints import step_name

# Other ranks sum gradients in another order, each sum rounded to 24 bits, or to 8. Measured under bf16: 1e-4; 8e-3 or
# more where a resize loses the moments. No loss shows whether master weights keep their last bits: a test compares.
TOLERANCES = {"fp32": 1e-5, "bf16": 1e-3}
STEPS_A_LEG = 4
_BEYOND = 2  # least steps that a leg makes after its commit, and loses when it is killed
_HORIZON = 10_000  # of the learning rate's schedule; no run gets there
_LAST_WRITES_S = 30.0


class _Killed(Exception):
    """A leg has gone far enough."""


@dataclass
class Leg:
    """One number of ranks, from its start to its kill.

    Attributes:
        ranks: how many.
        first: first step; the one after the last commit.
        last: last step, done or not yet committed when it was killed.
        deviation: largest relative difference of a loss to the single rank's.
        start_s: seconds from the start to the first completed step.
        convert_s: seconds of reading another number's commit; None where none was read.
    """

    ranks: int
    first: int = 0
    last: int = 0
    deviation: float = 0.0
    start_s: float = 0.0
    convert_s: float | None = None


@dataclass
class _Listener:
    """Writes down a gang's losses; ends it, as a kill would, at a step, once a commit before it stands."""

    until: int
    commit: int
    tell: Listener
    began: float = field(default_factory=time.time)
    losses: dict[int, float] = field(default_factory=dict)
    start_s: float = 0.0
    convert_s: float | None = None
    committed: int = 0

    def __call__(self, event: dict[str, Any]) -> None:
        self.tell(event)
        if event["event"] == "convert":
            self.convert_s = event["seconds"]
        if event["event"] == "commit":
            self.committed = event["step"]
        if event["event"] == "step":
            self.start_s = self.start_s or event["time"] - self.began
            self.losses[event["step"]] = event["loss"]
            if event["step"] >= self.until and self.committed >= self.commit:
                raise _Killed


def sizes_of(config: RunConfig) -> list[int]:
    """Up to three numbers of ranks that share the batch, up to the largest, and down again."""
    range_from_one = config.cluster.model_copy(update={"min_world_size": 1})
    sizes = config.model_copy(update={"cluster": range_from_one}).world_sizes
    rising = sorted({1, *sizes[:2]})
    return [*rising, rising[-2] if len(rising) > 1 else 1]


def verify_resume(config: RunConfig, directory: Path, tell: Listener, sizes: Sequence[int]) -> dict[str, Any]:
    """Compares the losses of every leg with the uninterrupted single rank's; needs a connected Ray.

    Args:
        config: the run's settings.
        directory: the run's directory, for its corpus; the two runs are made beside it.
        tell: told the gangs' events.
        sizes: ranks of each leg.

    Returns:
        ``largest_deviation``, ``tolerance``, ``holds``, and the ``legs``.

    Raises:
        InputError: no corpus, or arithmetic for which the losses need not be the same.
    """
    require_manifest(RunFiles(directory).corpus, "corpus", "prepare")
    tolerance = TOLERANCES.get(config.pretrain.precision)
    if tolerance is None:
        raise InputError(
            f"pretrain.precision is {config.pretrain.precision!r}: how near losses stay there was not measured; give "
            "--set pretrain.precision=bf16 or fp32"
        )
    if config.pretrain.dropout:
        raise InputError(
            f"pretrain.dropout is {config.pretrain.dropout:g}: its masks depend on the number of ranks, and so do "
            "losses; give --set pretrain.dropout=0"
        )
    folder = Path(tempfile.mkdtemp(prefix=f"{directory.name}-verify-resume-", dir=directory.parent))
    try:
        for name in ("single", "legs"):
            RunFiles(folder / name).checkpoints.mkdir(parents=True)
            RunFiles(folder / name).corpus.symlink_to(RunFiles(directory).corpus)
            RunFiles(folder / name).tokenizer.symlink_to(RunFiles(directory).tokenizer)
        legs = _train(config, folder, tell, sizes)
    finally:
        _remove(folder)
    largest = _largest([leg.deviation for leg in legs])
    return {
        "largest_deviation": largest,
        "tolerance": tolerance,
        "holds": largest <= tolerance,
        "zero_stage": config.pretrain.zero_stage,
        "steps": STEPS_A_LEG * len(sizes),
        "legs": [asdict(leg) for leg in legs],
    }


def _largest(values: Sequence[float]) -> float:
    """The largest; not a number where one is none: ``max`` would pass over it, wherever it is not the first."""
    return float(np.max(values))


def _remove(folder: Path) -> None:
    """The folder with all that is in it, though a killed rank may be writing there for a moment yet."""
    deadline = time.monotonic() + _LAST_WRITES_S
    while folder.exists():
        try:
            shutil.rmtree(folder)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _train(config: RunConfig, folder: Path, tell: Listener, sizes: Sequence[int]) -> list[Leg]:
    """The legs, compared with a single rank."""
    last = STEPS_A_LEG * len(sizes)
    alone = _Listener(last, last, tell)
    _gang(config, folder / "single", 1, last, alone)
    legs = []
    for number, ranks in enumerate(sizes):
        done = STEPS_A_LEG * (number + 1)
        if number == 0 and ranks == 1:  # the uninterrupted run is this leg
            name = step_name(done)
            shutil.copytree(
                RunFiles(folder / "single").checkpoints / name, RunFiles(folder / "legs").checkpoints / name
            )
            legs.append(Leg(1, 1, done, start_s=alone.start_s))
            continue
        leg = _Listener(min(done + _BEYOND, last), done, tell)
        _gang(config, folder / "legs", ranks, last, leg)
        for path in RunFiles(folder / "legs").checkpoints.glob("step-*"):
            if path.name > step_name(done):  # ranks don't stop at once; the next leg is to begin at this commit
                shutil.rmtree(path)
        compared = {step: loss for step, loss in leg.losses.items() if step in alone.losses}
        deviation = _largest([abs(loss / alone.losses[step] - 1) for step, loss in compared.items()])
        legs.append(Leg(ranks, min(compared), max(compared), deviation, leg.start_s, leg.convert_s))
    return legs


def _gang(config: RunConfig, directory: Path, ranks: int, steps: int, listener: _Listener) -> None:
    cluster = {
        "world_size": ranks,
        "min_world_size": 0,
        "max_failures": 0,
        "standbys": False,
        "scratch_dir": str(directory.parent / "scratch"),
    }
    pretrain = {
        "steps": _HORIZON,
        "warmup_steps": min(config.pretrain.warmup_steps, STEPS_A_LEG),
        "commit_every": STEPS_A_LEG,
        "keep_commits": _HORIZON,
        "validate_every": _HORIZON,
        "stages": _drawn_together(config.pretrain.stages, steps),
    }
    run = {"storage": str(directory.parent), "name": directory.name}
    scratch = config.model_copy(
        update={
            "run": config.run.model_copy(update=run),
            "cluster": config.cluster.model_copy(update=cluster),
            "pretrain": config.pretrain.model_copy(update=pretrain),
        }
    )
    with suppress(_Killed):
        run_gang(scratch, directory, listener)


def _drawn_together(stages: tuple[TrainingStage, ...], steps: int) -> tuple[TrainingStage, ...]:
    """The same stages, all of which begin within so many steps."""
    each = max(1, steps // max(1, len(stages)))
    rest = _HORIZON - each * (len(stages) - 1)
    return tuple(
        stage.model_copy(update={"steps": each if number < len(stages) else rest})
        for number, stage in enumerate(stages, 1)
    )


def lines(document: dict[str, Any]) -> list[str]:
    """The result for people."""
    rows = [f"{'ranks':>5}  {'steps':>9}  {'deviation':>9}  {'first step':>10}  {'resized in':>10}"]
    for leg in document["legs"]:
        steps = f"{leg['first']} to {leg['last']}"
        resized = "" if leg["convert_s"] is None else f"{leg['convert_s']:.2f} s"
        start = f"{leg['start_s']:.1f} s"
        rows.append(f"{leg['ranks']:>5}  {steps:>9}  {leg['deviation']:>9.1e}  {start:>10}  {resized:>10}")
    verdict = "holds" if document["holds"] else "DOES NOT HOLD"
    rows.append(
        f"largest deviation from a single uninterrupted rank: {document['largest_deviation']:.1e} "
        f"(at most {document['tolerance']:g}): {verdict}"
    )
    return rows
