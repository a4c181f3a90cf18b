"""``siloweave federation run``, whose rounds the same listeners show as a simulation's, and ``rehearse`` before it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.commands.stages import JsonOption, SetOption
from configs.load import load
from configs.locks import working_on
from configs.printing import answer, say
from configs.run_directory import run_directory
from configs.storage.layout import CERTIFICATE, FEDERATED


def run(
    folder: Annotated[Path, typer.Argument(help="The federation's folder.")],
    config: Annotated[str, typer.Option("--config", "-c", help="A TOML file, or a preset's name.")],
    overrides: SetOption = None,
    renew: Annotated[
        bool,
        typer.Option("--renew", help="Start a run whose time is up anew; says what that costs in epsilon."),
    ] = False,
) -> None:
    """Runs the rounds over the enrolled silos, to the end; continues after a kill. Its exit status is the run's."""
    from cluster.monitoring.listeners import listening
    from federated.deployment.federation_folder import FederationFolder
    from federated.deployment.served_run import run as run_rounds

    settings = load(config, overrides or [])
    with working_on(run_directory(settings)), listening(settings) as listeners:

        def on_event(event: dict[str, Any]) -> None:
            _say(event)
            for listener in listeners:
                # As in a simulation, so that both have the same curves.
                listener({**event, "stage": FEDERATED})

        directory = run_rounds(FederationFolder(folder), settings, on_event, say if renew else None)
    say(f"finished: {directory / CERTIFICATE}")


def rehearse(
    folder: Annotated[Path, typer.Argument(help="The federation's folder.")],
    config: Annotated[str, typer.Option("--config", "-c", help="A TOML file, or a preset's name.")],
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tries a run at every site on made-up records, and says what to mend. Exit status 0: go; 3: a policy refuses.

    No record is read for it, and nothing is charged.
    """
    from cluster.checks.doctor import coordinating
    from federated.deployment.federation_folder import FederationFolder
    from federated.deployment.federation_rehearsal import rehearse as try_run

    settings = load(config, overrides or [])
    found = try_run(FederationFolder(folder), settings, coordinating(settings))
    answer(as_json, found.document(), *found.lines())
    if found.exit_status:
        raise typer.Exit(found.exit_status)


def _say(event: dict[str, Any]) -> None:
    shown = {key: value for key, value in event.items() if key not in ("time", "stage", "event")}
    say(f"{event['event']}: " + ", ".join(f"{key} {value}" for key, value in shown.items()))
