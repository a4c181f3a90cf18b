"""``siloweave synthesise``."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.chat import ModelArgument
from cluster.commands.generate import DecodeOption
from cluster.commands.stages import JsonOption, quiet_libraries
from configs.printing import answer


def synthesise(
    model: ModelArgument,
    records: Annotated[int, typer.Option(help="How many records to write.")],
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where to write, as .jsonl, .csv or .parquet, in a folder that is not there yet. Default: "
            "synthetic/records.jsonl in the run."
        ),
    ] = None,
    given: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=VALUE",
            help="A field that the model does not write, as label=positive; each value gets as many records. May be "
            "repeated.",
        ),
    ] = None,
    decode: DecodeOption = None,
    not_private: Annotated[
        bool, typer.Option("--not-private", help="Also where no certificate bounds what the records tell of others.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Writes records that a finished run's model makes up: filtered, each once, with the model's certificate.

    It costs no privacy budget. Tokens are drawn at temperature 1 from 0.95 of the probability, by run.seed, if
    `--decode` says nothing else. An interrupted command goes on where it stopped when it is given again.
    """
    quiet_libraries()
    from cluster import synthesising
    from cluster.monitoring.console import Progressing

    file = output or synthesising.usual_file(model)
    wanted = synthesising.Wanted(records, file, given or [], decode or [], not_private)
    with Progressing(quiet=as_json) as shown:
        made = synthesising.make(
            model,
            wanted,
            lambda done, of: shown({"event": "scored", "stage": "synthesise", "done": done, "of": of}),
        )
    dropped = [f"{count:,} texts dropped: {why}" for why, count in made["dropped"].items()]
    done = f"synthesise: {made['records']:,} records in {file}"
    answer(as_json, made, *dropped, f"privacy: {made['privacy']['line']}", done)
