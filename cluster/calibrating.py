"""How a finished model's answers are read or written: fitted on public records, and kept beside the model."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.finished import Finished
from cluster.public_records import public_records
from configs.errors import InputError
from configs.schema.tasks import WRITTEN
from configs.storage.files import write_atomic
from configs.storage.layout import CALIBRATION
from trainer.scoring.calibrating import figures, fit, judged
from trainer.scoring.decodings import best_way, ways_of
from trainer.tasks.task import Calibration

_MOST, _MOST_WRITTEN = 10_000, 200  # records
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Calibrated:
    """What was found.

    Attributes:
        model: digest of the model that it is for.
        read: whose records it was found on.
        fitted: how many of them, every other one.
        measured: how many others the figures are of.
        found: of labels ``temperature``, which divides what the model says, and ``thresholds`` of each one's
            probability, none where a text has one label; of answers that are written the best ``decoding``.
        before: figures of the others without this.
        after: with it.
    """

    model: str
    read: str
    fitted: int
    measured: int
    found: dict[str, Any]
    before: dict[str, float]
    after: dict[str, float]

    @property
    def document(self) -> dict[str, Any]:
        """The same for JSON."""
        document = asdict(self)
        return {**document, **document.pop("found")}


def calibrate(
    found: Finished, records: Path | None, most: int, tell: OnProgress = lambda *_: None
) -> tuple[Calibrated, Path]:
    """Fits how answers are read or written, and keeps that where `predict`, and for labels `serve`, find it.

    Args:
        found: the model.
        records: a file of public ones; None: the run's own public records.
        most: tokens of an answer that is text.
        tell: receives how many of these are written, and of how many.

    Returns:
        What was found, and the file that has it.

    Raises:
        InputError: the task has neither labels with probabilities nor answers that are written, or there are no public
            records, or too few.
        PolicyRefusal: the records are where the silos' are.
        SiloweaveError: the file can't be written.
    """
    writes = found.config.federated.task in WRITTEN
    read, units = public_records(found, records, _MOST_WRITTEN if writes else _MOST)
    if not units:
        raise InputError("the run has no public records to calibrate on; give some by --records FILE")
    examples = [example for unit in units for example in found.task.scored(unit)]
    done = _written(found, read, examples, most, tell) if writes else _labelled(found, read, examples)
    path = found.made / CALIBRATION
    write_atomic(path, json.dumps(done.document, indent=2).encode() + b"\n")
    return done, path


def _labelled(found: Finished, read: str, examples: Sequence[Any]) -> Calibrated:
    several = found.config.federated.task == "multilabel"
    logits_NL, truths_NL = judged(found.model, found.task, examples, found.config.federated.micro_batch_size)
    calibration = fit(logits_NL[::2], truths_NL[::2], several=several)
    before, after = (
        figures(logits_NL[1::2], truths_NL[1::2], one, several=several) for one in (Calibration(), calibration)
    )
    fitted = len(logits_NL[::2])
    return Calibrated(found.digest, read, fitted, len(logits_NL) - fitted, asdict(calibration), before, after)


def _written(found: Finished, read: str, examples: Sequence[Any], most: int, tell: OnProgress) -> Calibrated:
    examples = examples[:_MOST_WRITTEN]
    way, before, after = best_way(found.model, found.task, examples, most, tell)
    fitted = len(examples[::2])
    kept = {"decoding": way._asdict(), "max_new_tokens": most, "ways": len(ways_of(found.model))}
    counts = (fitted, len(examples) - fitted)
    return Calibrated(found.digest, read, *counts, kept, {"chrf": before}, {"chrf": after})
