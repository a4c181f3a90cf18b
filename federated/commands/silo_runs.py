"""``siloweave silo runs``: what a silo's steward sees of the runs, and how one is ended."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.errors import InputError
from configs.printing import answer

if TYPE_CHECKING:
    from configs.schema.silo import SiloConfig
    from privacy.ledger.journal import Journal
    from privacy.ledger.runs import Run

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
_KEY_SHOWN = 16  # hexadecimal digits
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
    settings, journal = _opened(config)
    found = runs_of(settings, journal)
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
    settings, journal = _opened(config)
    stopped = end(settings, journal, wanted, coordinator)
    answer(as_json, stopped, f"{_line(stopped)}; what it reserved stays spent")


def runs_of(settings: "SiloConfig", journal: "Journal") -> list[dict[str, Any]]:
    """All runs, oldest first."""
    from privacy.ledger.runs import Runs

    names = _names(settings)
    return [_shown(run, names) for run in Runs(journal.bodies())]


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
    from privacy.ledger.runs import STEWARD, Runs

    names = _names(settings)
    with journal.transaction():
        found = [run for run in Runs(journal.bodies()).open() if wanted in (run.name, run.opening["number"])]
        fitting = [run for run in found if coordinator is None or coordinator in _called(run, names)]
        if len(fitting) != 1:
            owners = "; ".join(" ".join(_called(run, names)) for run in found) or "nobody"
            raise InputError(
                f"silo runs stop: {len(fitting)} open runs are called {wanted!r} (open under this name: of {owners}); "
                "give a run that `silo runs` shows as open, and --coordinator where several have this name"
            )
        journal.end(fitting[0], by=STEWARD)
    journal.scrub()
    number = fitting[0].opening["number"]
    return next(_shown(run, names) for run in Runs(journal.bodies()) if run.opening["number"] == number)


def journal_of(settings: "SiloConfig") -> "Journal":
    """The ledger file of a silo, made where it is missing."""
    from privacy.ledger.journal import Journal

    return Journal(Path(settings.silo.state_dir), _anchor_dir(settings), settings.silo.id, settings.silo.dataset_id)


def found_journal(settings: "SiloConfig", *, mend: bool = False) -> "Journal":
    """The ledger file of a silo that has one. A command that only looks must make neither it nor its key.

    Args:
        settings: the silo's.
        mend: a ledger that is lost, and known by its anchor or its key, is made anew.

    Raises:
        InputError: there is none.
    """
    from configs.storage.layout import SiloFiles
    from privacy.ledger.anchor import Anchor
    from privacy.ledger.journal import RECONCILE

    files, anchor = SiloFiles(Path(settings.silo.state_dir)), Anchor(_anchor_dir(settings)).path
    ledger, known = files.ledger, anchor.exists() or files.key.exists()
    if ledger.exists() or (mend and known):
        return journal_of(settings)
    if anchor.exists():
        raise InputError(f"{ledger}: missing, and {anchor} tells of it; put its backup back, or run {RECONCILE}")
    raise InputError(f"{ledger}: no ledger yet; `siloweave silo init` and `silo serve` make it")


def _anchor_dir(settings: "SiloConfig") -> Path:
    from privacy.ledger.journal import anchor_dir_of

    return anchor_dir_of(Path(settings.silo.state_dir), settings.silo.anchor_dir)


def _opened(config: Path) -> "tuple[SiloConfig, Journal]":
    from configs.schema.silo import load_silo

    settings = load_silo(config)
    return settings, found_journal(settings)


def _names(settings: "SiloConfig") -> dict[str, str]:
    from federated.deployment.silo_site import trusted

    return {key: name for name, key in trusted(settings).items()}


def _called(run: "Run", names: dict[str, str]) -> tuple[str, ...]:
    """How a steward may call a run's coordinator: by its name, where it is trusted, and by its key's beginning."""
    if not run.coordinator:
        return ("not named",)
    key = run.coordinator[:_KEY_SHOWN]
    return (names[run.coordinator], key) if run.coordinator in names else (key,)


def _shown(run: "Run", names: dict[str, str]) -> dict[str, Any]:
    return {
        "entry": run.opening["number"],
        "run": run.name,
        "coordinator": " ".join(_called(run, names)),
        "epsilon_reserved": run.opening.get("epsilon", 0.0),
        "rounds_charged": run.rounds_charged,
        "rounds_planned": run.opening["plan"]["rounds"],
        "opened": datetime.fromtimestamp(run.opening["time"], tz=UTC).isoformat(timespec="seconds"),
        "state": "stopped by the steward" if run.stopped else "open" if run.closing is None else "closed",
    }


def _line(run: dict[str, Any]) -> str:
    return (
        f"entry {run['entry']}  {run['run']!r}  {run['state']}  of {run['coordinator']!r}  "
        f"epsilon {run['epsilon_reserved']:.4g}  {run['rounds_charged']} of {run['rounds_planned']} rounds  "
        f"since {run['opened']}"
    )
