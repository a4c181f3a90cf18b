"""``siloweave evaluate``."""

from typing import Annotated

import typer

from cluster.commands.stages import AddressOption, ConfigOption, JsonOption, SetOption, overrides, with_run
from configs.load import load
from configs.printing import answer


def evaluate(
    config: ConfigOption = "demo",
    override: SetOption = None,
    address: AddressOption = "",
    base: Annotated[bool, typer.Option("--base", help="Only the base model, before any fine-tuning.")] = False,
    shots: Annotated[
        int, typer.Option(min=0, help="Only the base model, after so many worked examples of public training records.")
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """A task's figures on a simulation's public silos, and on `evaluate.public`, a public text of one's own."""
    if base or shots:
        _evaluate_base(config, override, shots, as_json)
        return
    from cluster import pipeline

    scores, directory = with_run(load(config, overrides(override, address)), pipeline.evaluate, as_json)
    from cluster.monitoring.console import Terminal, figure_tables
    from cluster.report.report import in_full

    found = in_full(scores)
    for table in figure_tables(found) if not as_json else []:
        Terminal().print(table)
    done = {"stage": "evaluate", "directory": str(directory), "in_full": found}
    answer(as_json, done, f"evaluate: done in {directory}")


def _evaluate_base(config: str, override: list[str] | None, shots: int, as_json: bool) -> None:
    from cluster import pipeline

    (found, lines), _ = with_run(load(config, override or []), lambda run: pipeline.evaluate_base(run, shots), as_json)
    answer(as_json, found, *lines)
