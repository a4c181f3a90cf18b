"""``siloweave calibrate``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.chat import ElsewhereOption, ModelArgument
from cluster.commands.stages import JsonOption, quiet_libraries
from configs.load import load
from configs.printing import FIGURES, answer

_NAMES = {**FIGURES, "expected_calibration_error": "expected calibration error"}


def calibrate(
    model: ModelArgument,
    records: Annotated[
        Path | None, typer.Option(help="Public records with labels. Default: evaluate.public, or the public silos.")
    ] = None,
    config: ElsewhereOption = "",
    as_json: JsonOption = False,
) -> None:
    """Fits how sure a classifier is, on public records: a temperature, and of several labels a threshold for each.

    It writes calibration.json beside the model, which `predict` and `serve` go by. It costs no privacy budget.
    """
    quiet_libraries()
    from cluster import calibrating
    from cluster.finished import finished_model

    found = finished_model(model, load(config) if config else None)
    done, path = calibrating.calibrate(found, records)
    figures = [
        f"{_NAMES.get(name, name)}: {value:.4f} before, {done.after[name]:.4f} after"
        for name, value in done.before.items()
    ]
    labels = dict(zip(found.config.federated.labels, done.thresholds, strict=False))
    answer(
        as_json,
        {**asdict(done), "file": str(path)},
        f"temperature: {done.temperature:.4f}, fitted on {done.fitted:,} records of {done.read}",
        *(f"threshold of {label}: {value:.4f}" for label, value in labels.items()),
        *(f"{line}, on {done.measured:,} others" for line in figures),
        f"calibrate: {path}",
    )
