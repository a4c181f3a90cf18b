"""How a finished model's labels are read: fitted on public records, and written beside the model."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.finished import Finished
from cluster.public_records import public_records
from configs.errors import InputError
from configs.storage.files import write_atomic
from configs.storage.layout import CALIBRATION
from trainer.scoring.calibrating import figures, fit, judged
from trainer.tasks.task import Calibration

_MOST = 10_000  # records


@dataclass(frozen=True)
class Calibrated:
    """What was found.

    Attributes:
        model: digest of the model that it is for.
        read: whose records it was found on.
        fitted: how many of them, every other one.
        measured: how many others the figures are of.
        temperature: what the model says is divided by it.
        thresholds: of each label's probability; empty where a text has one label.
        before: figures of the others without this.
        after: with it.
    """

    model: str
    read: str
    fitted: int
    measured: int
    temperature: float
    thresholds: tuple[float, ...]
    before: dict[str, float]
    after: dict[str, float]


def calibrate(found: Finished, records: Path | None) -> tuple[Calibrated, Path]:
    """Fits temperature and thresholds, and writes them where `predict` and `serve` find them.

    Args:
        found: the model.
        records: a file of public ones; None: the run's own public records.

    Returns:
        What was found, and the file that has it.

    Raises:
        InputError: the task has no labels with probabilities, or there are no public records, or too few.
        PolicyRefusal: the records are where the silos' are.
        SiloweaveError: the file can't be written.
    """
    read, units = public_records(found, records, _MOST)
    if not units:
        raise InputError("the run has no public records to calibrate on; give some by --records FILE")
    examples = [example for unit in units for example in found.task.scored(unit)]
    several = found.config.federated.task == "multilabel"
    logits_NL, truths_NL = judged(found.model, found.task, examples, found.config.federated.micro_batch_size)
    calibration = fit(logits_NL[::2], truths_NL[::2], several=several)
    before, after = (
        figures(logits_NL[1::2], truths_NL[1::2], one, several=several) for one in (Calibration(), calibration)
    )
    fitted = len(logits_NL[::2])
    done = Calibrated(
        found.digest, read, fitted, len(logits_NL) - fitted, **asdict(calibration), before=before, after=after
    )
    path = found.made / CALIBRATION
    write_atomic(path, json.dumps(asdict(done), indent=2).encode() + b"\n")
    return done, path
