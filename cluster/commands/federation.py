"""What the two sides of a federation show by the same listeners and plots as a simulation.

``siloweave federation run``: the rounds over silos elsewhere; ``rehearse``: whether they would work. ``siloweave silo
attack``: what left one of them. ``dashboard`` of either: a page of what there is to see.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.commands.stages import JsonOption, SetOption, quiet_libraries
from configs.errors import InputError
from configs.load import load
from configs.locks import working_on
from configs.printing import answer, say
from configs.run_directory import run_directory
from configs.storage.layout import CERTIFICATE, FEDERATED

PortOption = Annotated[int, typer.Option(min=0, max=65535, help="On loopback; 0 takes a free one, which is printed.")]
FiguresOption = Annotated[bool, typer.Option("--json", help="Print the page's figures once, and end.")]


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


def attack(
    config: Annotated[Path, typer.Option("--config", "-c", help="The silo.toml.")],
    run: Annotated[str, typer.Option(help="The run; by default the newest in which an update has left.")] = "",
    model: Annotated[
        Path | None, typer.Option(help="What the run has published, with its certificate: adapter/ or model/.")
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(help="Records that were never trained on, in the format of data.source, in place of the silo's."),
    ] = None,
    records: Annotated[int, typer.Option(min=20, help="Most records of each side.")] = 500,
    as_json: JsonOption = False,
) -> None:
    """Attacks what has left this silo: can its training records be told from held-out ones?

    Looks at each update that `silo.keep_released` has kept, and at the run's model. Nothing is sent. The figures are
    private data: they are written to `attack/` in the state directory, for its owner alone.
    """
    quiet_libraries()
    from cluster.monitoring.console import Progressing
    from cluster.report.attack_page import render, summary
    from configs.schema.silo import load_silo
    from configs.storage.files import private_folder, write_atomic
    from configs.storage.layout import SiloFiles
    from federated.audit.own_attack import attack as attacked
    from federated.audit.own_records import Wanted
    from federated.commands.silo_runs import found_journal

    settings = load_silo(config)
    files, wanted = SiloFiles(Path(settings.silo.state_dir)), Wanted(run, model, held_out, records)
    bodies = found_journal(settings).bodies()
    with Progressing(quiet=as_json) as shown:

        def on_done(done: int, of: int) -> None:
            shown({"event": "scored", "stage": "attack", "done": done, "of": of})

        document = attacked(settings, bodies, wanted, on_done)
    private_folder(files.attack_page.parent)
    write_atomic(files.attack_report, json.dumps(document, indent=2).encode() + b"\n", 0o600)
    write_atomic(files.attack_page, render(document).encode(), 0o600)
    answer(as_json, document, *summary(document), f"private data, not to be passed on: {files.attack_page}")


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


def silo_dashboard(
    config: Annotated[Path, typer.Option("--config", "-c", help="The silo.toml.")],
    socket: Annotated[Path | None, typer.Option(help="The service's socket, to ask whether it is serving.")] = None,
    port: PortOption = 0,
    as_json: FiguresOption = False,
) -> None:
    """Serves the steward's page: what was spent, by whom and for what, what left, what was refused, how to stop it.

    At this machine alone, under an address that the command prints. Nothing can be changed there, and the ledger is
    neither locked nor written to. Exit status 0 after SIGTERM or Ctrl-C.
    """
    from federated.deployment.steward.steward import figures

    _dashboard(partial(figures, config, socket), "silo.html.j2", port, as_json=as_json)


def federation_dashboard(
    folder: Annotated[Path, typer.Argument(help="The federation's folder.")],
    port: PortOption = 0,
    as_json: FiguresOption = False,
) -> None:
    """Serves the coordinator's page: which sites are up, down or refuse, and why; rounds, throughput, budgets left.

    At this machine alone, under an address that the command prints. Nothing can be changed there. Exit status 0 after
    SIGTERM or Ctrl-C.
    """
    from federated.deployment.federation_folder import FederationFolder
    from federated.deployment.federation_status import overview

    _dashboard(partial(overview, FederationFolder(folder)), "federation.html.j2", port, as_json=as_json)


def _dashboard(look: Callable[[], dict[str, Any]], template: str, port: int, *, as_json: bool) -> None:
    figures = look()  # what is wrong now is said before a page is there
    if as_json:
        answer(True, figures)
        return
    try:
        from cluster.dashboard.dashboard import Dashboard, serve
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed; `pip install 'siloweave[serve]'`, or give --json") from None
    serve(Dashboard(look, template), port, lambda address: say(f"dashboard at {address}"))
    say("dashboard: stopped", err=True)


def _say(event: dict[str, Any]) -> None:
    shown = {key: value for key, value in event.items() if key not in ("time", "stage", "event")}
    say(f"{event['event']}: " + ", ".join(f"{key} {value}" for key, value in shown.items()))
