"""``siloweave silo runs``: what a silo's steward sees of the runs, and how one is ended."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.errors import InputError
from configs.printing import answer

if TYPE_CHECKING:
    from configs.schema.silo import SiloConfig
    from privacy.ledger.journal import Journal

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
runs_app = typer.Typer(help="The runs of a silo.")


@runs_app.callback(invoke_without_command=True)
def runs(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="The silo.toml.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Every run in the silo's ledger, oldest first: whose it is, what it reserved, how far it is."""
    if context.invoked_subcommand is not None:
        return
    if config is None:
        raise InputError("silo runs: no settings; give --config silo.toml")
    from configs.schema.silo import load_silo
    from federated.deployment.steward.entries import Coordinators, run_row
    from federated.deployment.steward.ledger_look import look
    from privacy.ledger.runs import Runs

    settings = load_silo(config)
    coordinators = Coordinators(settings)
    found = [run_row(run, coordinators) for run in Runs(look(settings).bodies)]
    answer(as_json, found, *(map(_line, found) if found else ["no runs"]))


@runs_app.command()
def stop(
    config: Annotated[Path, typer.Option("--config", "-c", help="The silo.toml.")],
    run: Annotated[str | None, typer.Argument(help="The run's name, as `silo runs` shows it.")] = None,
    entry: Annotated[int | None, typer.Option(help="Instead of the name: its entry, as `silo runs` shows it.")] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(help="Whose run, by name or key as `silo runs` shows it, where several have one of this name."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Ends a run, even while the service is running: nothing more is released to it. What it reserved stays spent."""
    wanted = entry if run is None else run
    if wanted is None or None not in (run, entry):
        raise InputError("silo runs stop: give the run's name, or --entry with the number that `silo runs` shows")
    from configs.schema.silo import load_silo

    settings = load_silo(config)
    journal = found_journal(settings)
    stopped = end(settings, journal, wanted, coordinator)
    answer(as_json, stopped, f"{_line(stopped)}; what it reserved stays spent")


def end(settings: "SiloConfig", journal: "Journal", wanted: str | int, coordinator: str | None) -> dict[str, Any]:
    """Closes an open run, in an entry that says that the steward did.

    Args:
        settings: the silo's.
        journal: its ledger.
        wanted: the run's name, or the number of the entry that opened it: names may look alike.
        coordinator: whose run; None where only one fits.

    Raises:
        InputError: there is no such open run, or several.
    """
    from federated.deployment.steward.entries import Coordinators, run_row
    from privacy.ledger.runs import STEWARD, Runs

    coordinators = Coordinators(settings)
    with journal.transaction():
        found = [run for run in Runs(journal.bodies()).open() if wanted in (run.name, run.opening["number"])]
        fitting = [run for run in found if coordinator is None or coordinator in coordinators.called(run.coordinator)]
        if len(fitting) != 1:
            owners = "; ".join(coordinators.shown(run.coordinator) for run in found) or "nobody"
            raise InputError(
                f"silo runs stop: {len(fitting)} open runs are called {wanted!r} (open under this name: of {owners}); "
                "give a run that `silo runs` shows as open, and --coordinator where several have this name"
            )
        journal.end(fitting[0], by=STEWARD)
    journal.scrub()
    number = fitting[0].opening["number"]
    return next(run_row(run, coordinators) for run in Runs(journal.bodies()) if run.opening["number"] == number)


def journal_of(settings: "SiloConfig") -> "Journal":
    """The ledger file of a silo, made where it is missing."""
    from federated.deployment.steward.ledger_look import anchor_dir
    from privacy.ledger.journal import Journal

    return Journal(Path(settings.silo.state_dir), anchor_dir(settings), settings.silo.id, settings.silo.dataset_id)


def found_journal(settings: "SiloConfig", *, mend: bool = False) -> "Journal":
    """The ledger file of a silo that has one.

    Args:
        settings: the silo's.
        mend: a ledger that is lost, and known by its anchor or its key, is made anew.

    Raises:
        InputError: there is none.
    """
    from federated.deployment.steward.ledger_look import require_ledger

    require_ledger(settings, mend=mend)
    return journal_of(settings)


def _line(run: dict[str, Any]) -> str:
    return (
        f"entry {run['entry']}  {run['run']!r}  {run['state']}  of {run['coordinator']!r}  "
        f"epsilon {run['epsilon_reserved']:.4g}  {run['rounds_charged']} of {run['rounds_planned']} rounds  "
        f"since {run['opened']}"
    )
