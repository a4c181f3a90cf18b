"""``siloweave predict``."""

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.chat import ElsewhereOption, ModelArgument
from cluster.commands.stages import JsonOption, quiet_libraries
from configs.load import load
from configs.printing import answer


def predict(
    model: ModelArgument,
    source: Annotated[Path, typer.Option("--input", help="Records: .jsonl, .csv or .parquet.")],
    output: Annotated[Path, typer.Option("--output", help="Where to write, as .jsonl, .csv or .parquet.")],
    config: ElsewhereOption = "",
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="FIELD=COLUMN", help="The file's name for a field. May be repeated."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer that is text.")] = 64,
    workers: Annotated[
        int,
        typer.Option(
            min=0,
            max=4096,
            help="Processes that answer, of a core each, by Ray Data on the Ray of RAY_ADDRESS, else on one of this "
            "command's own. The output is the same. Default: this process alone.",
        ),
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Answers a file's records with a finished run's model, each row with its prediction.

    Columns are those of the run's data.private, if `--column` says nothing else. An interrupted command goes on where
    it stopped when it is given again. Records that can't be answered are listed in OUTPUT.bad.jsonl.
    """
    quiet_libraries()
    from cluster.monitoring.console import Progressing
    from cluster.predicting import Asked, by_workers
    from trainer.inference import predicting

    asked = Asked(model.resolve(), load(config) if config else None, tuple(columns or ()), max_new_tokens)
    found, asking, calibration = asked.load()
    spec = found.config.federated.task_spec
    asked_by = {"model": found.digest, "task": spec.model_dump(mode="json"), "tokens": max_new_tokens}
    asked_by |= {"calibration": calibration} if calibration else {}
    with Progressing(quiet=as_json) as shown, by_workers(asked, workers) if workers else nullcontext() as by:
        made = predicting.predict(
            asking,
            spec.labels,
            source,
            output,
            {**asked_by, "columns": asking.columns},
            lambda done, of: shown({"event": "scored", "stage": "predict", "done": done, "of": of}),
            by,
        )
    bad = f"; {made.bad} could not be answered: {made.bad_file} says why" if made.bad_file else ""
    document = {**asdict(made), "bad_file": str(made.bad_file or ""), "output": str(output), "model": found.digest}
    document |= {"calibration": calibration} if calibration else {}
    answer(as_json, document, f"predict: {made.records - made.bad} of {made.records} records in {output}{bad}")
