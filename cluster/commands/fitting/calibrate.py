"""``siloweave calibrate``."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.commands.chat import ElsewhereOption, ModelArgument
from cluster.commands.stages import JsonOption, quiet_libraries
from configs.load import load
from configs.printing import FIGURES, answer

if TYPE_CHECKING:
    from cluster.calibrating import Calibrated

_NAMES = {**FIGURES, "expected_calibration_error": "expected calibration error", "chrf": "chrF"}


def calibrate(
    model: ModelArgument,
    records: Annotated[
        Path | None,
        typer.Option(help="Public records with right answers. Default: evaluate.public, or the public silos."),
    ] = None,
    config: ElsewhereOption = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer that is text.")] = 64,
    as_json: JsonOption = False,
) -> None:
    """Fits how a model's answers are read or written, on public records.

    Of labels it finds how sure the model may be: a temperature, and of several labels a threshold for each. Of answers
    that are text it tries beam searches and penalties for what is repeated. It writes calibration.json beside the
    model, which `predict` goes by, and for labels `serve`, too. It costs no privacy budget.
    """
    quiet_libraries()
    from cluster import calibrating
    from cluster.finished import finished_model
    from cluster.monitoring.console import Progressing

    found = finished_model(model, load(config) if config else None)
    with Progressing(quiet=as_json) as shown:
        done, path = calibrating.calibrate(
            found,
            records,
            max_new_tokens,
            lambda done, of: shown({"event": "scored", "stage": "calibrate", "done": done, "of": of}),
        )
    figures = [
        f"{_NAMES.get(name, name)}: {value:.4f} before, {done.after[name]:.4f} after"
        for name, value in done.before.items()
    ]
    answer(
        as_json,
        {**done.document, "file": str(path)},
        *_found(done, found.config.federated.labels),
        *(f"{line}, on {done.measured:,} others" for line in figures),
        f"calibrate: {path}",
    )


def _found(done: "Calibrated", labels: Sequence[str]) -> list[str]:
    on = f"on {done.fitted:,} records of {done.read}"
    if "decoding" in done.found:
        way = ", ".join(f"{name}={value:g}" for name, value in done.found["decoding"].items())
        return [f"decoding: {way}, the best of {done.found['ways']} {on}"]
    named = zip(labels, done.found["thresholds"], strict=False)
    thresholds = [f"threshold of {label}: {value:.4f}" for label, value in named]
    return [f"temperature: {done.found['temperature']:.4f}, fitted {on}", *thresholds]
