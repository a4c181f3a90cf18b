"""``siloweave optimise``."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.commands.chat import ElsewhereOption, ModelArgument
from cluster.commands.stages import JsonOption, quiet_libraries
from configs.load import load
from configs.printing import FIGURES, answer

if TYPE_CHECKING:
    from rich.table import Table

    from cluster.optimising import Optimised

_NAMES = {"bytes": "bytes of weights", "zeros": "share of zeros", "seconds_a_batch": "seconds a batch", **FIGURES}


def optimise(
    model: ModelArgument,
    method: Annotated[
        str,
        typer.Option(
            help="prune: weights become zero; neurons, heads: they are cut out; int8, int4: weights become integers; "
            "distil: a student of fewer layers learns from the model, on the run's public text."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Where to write; nothing may be there yet.")],
    share: Annotated[
        float | None, typer.Option(help="Of what is removed, between 0 and 1. Default: half; int8 and int4 take all.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Batches that a student learns from. Default: 500.")] = None,
    records: Annotated[
        Path | None,
        typer.Option(help="Records to compare both models on. Default: evaluate.public, or the public silos."),
    ] = None,
    config: ElsewhereOption = "",
    as_json: JsonOption = False,
) -> None:
    """Makes a finished model smaller, as a Hugging Face directory, and shows size, speed and quality before and after.

    It costs no privacy budget. The figures lie in the directory as optimisation.json: give records that may be public.
    """
    quiet_libraries()
    from cluster import optimising
    from cluster.finished import finished_model
    from cluster.monitoring.console import Progressing, Terminal

    order = optimising.Order(method, share, steps)
    optimising.refuse_existing(output)
    found = finished_model(model, load(config) if config else None)
    with Progressing(quiet=as_json) as shown:
        done, manifest = optimising.optimise(
            found,
            order,
            output,
            records,
            lambda at, of, _loss: shown({"event": "scored", "stage": "distil", "done": at, "of": of}),
        )
    if not as_json:
        Terminal().print(_table(done))
    document = {**asdict(done), "directory": str(output), "digest": manifest.content_digest, "inputs": manifest.inputs}
    answer(as_json, document, found.privacy, f"optimise: the model is in {output}")


def _table(done: "Optimised") -> "Table":
    from rich.table import Table

    read = f"figures of {done.records:,} records of {done.read}" if done.read else "no records to compare answers on"
    of = "" if done.share is None else f", share {done.share:g}"
    of += "" if done.steps is None else f", {done.steps:,} steps"
    table = Table(title=f"{done.method}{of}; {read}", title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name, value in done.before.items():
        table.add_row(_NAMES.get(name, name), _shown(value), _shown(done.after[name]))
    return table


def _shown(value: float | None) -> str:
    if value is None:
        return "not available"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
