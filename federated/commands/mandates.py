"""``siloweave silo mandate``: what a silo's steward signs for a study, looks at, and takes back."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.errors import InputError
from configs.printing import answer
from federated.commands.silo_runs import found_journal

if TYPE_CHECKING:
    from configs.schema.silo import SiloConfig
    from federated.silo.mandates.folder import Mandates
    from privacy.ledger.journal import Journal
    from privacy.mandate import MandateTerms

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The silo.toml.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
mandate_app = typer.Typer(help="The studies that may ask a silo.", no_args_is_help=True)


@mandate_app.callback()
def mandate() -> None:
    """The studies that may ask a silo."""


@mandate_app.command()
def add(
    config: ConfigOption,
    file: Annotated[Path, typer.Argument(help="What the study may ask for, as TOML.")],
    as_json: JsonOption = False,
) -> None:
    """Signs a mandate with the silo's key, in force at once. From the first one on, nothing is answered without."""
    from federated.deployment.steward.mandate_rows import mandate_row
    from federated.silo.mandates.folder import IN_FORCE

    mandates, journal, settings = _opened(config)
    terms = _terms(file, settings)
    try:
        added = mandates.add(terms, journal.signer)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    shown = mandate_row(terms.study, IN_FORCE, added, journal.bodies())
    answer(as_json, shown, f"{_line(shown)}; digest {added.digest}")


@mandate_app.command("list")
def show(config: ConfigOption, as_json: JsonOption = False) -> None:
    """Every mandate, those in force first: whose it is, for what and how long, and what its study has reserved."""
    from configs.schema.silo import load_silo
    from federated.deployment.steward.ledger_look import look
    from federated.deployment.steward.mandate_rows import mandate_rows
    from federated.silo.mandates.folder import Mandates

    settings = load_silo(config)
    looked = look(settings)
    found, asked = mandate_rows(settings, looked), Mandates.of(settings, looked.public_key).are_asked_for
    nothing = "no mandates; nothing is answered" if asked else "no mandates; none is asked for"
    answer(as_json, found, *(map(_line, found) if found else [nothing]))


@mandate_app.command()
def revoke(
    config: ConfigOption,
    study: Annotated[str, typer.Argument(help="The study, as `silo mandate list` shows it.")],
    as_json: JsonOption = False,
) -> None:
    """Refuses the study's next request, in runs that are open, too. What they have reserved stays spent."""
    mandates, _, _ = _opened(config)
    if study not in [name for name, _, _ in mandates.listed()]:
        raise InputError(f"{study!r}: no mandate of this silo is called so; `siloweave silo mandate list` shows them")
    digest = mandates.revoke(study)
    line = f"{study}: revoked from the next request on; `siloweave silo runs stop` ends its open runs"
    answer(as_json, {"study": study, "digest": digest, "state": "revoked"}, line)


def _opened(config: Path) -> "tuple[Mandates, Journal, SiloConfig]":
    from configs.schema.silo import load_silo
    from federated.silo.mandates.folder import Mandates

    settings = load_silo(config)
    journal = found_journal(settings)
    return Mandates.of(settings, journal.signer.public_key), journal, settings


def _terms(file: Path, settings: "SiloConfig") -> "MandateTerms":
    """A mandate's TOML, in which a trusted coordinator may be called by its name."""
    from configs.parse import parse, read_toml, refuse_stream
    from federated.deployment.silo_site import trusted
    from privacy.mandate import MandateTerms

    refuse_stream(file, "give a mandate's TOML")
    tree, known = read_toml(file), trusted(settings)
    named = tree.get("coordinator")
    key = known.get(named, named) if isinstance(named, str) else named
    if key not in known.values():
        names = ", ".join(sorted(known)) or "none"
        raise InputError(
            f"{file}: coordinator is {str(named)[:100]!r}, and no trusted coordinator has this name or key (there are "
            f"{names}); `siloweave silo trust` takes one in"
        )
    return parse(MandateTerms, {**tree, "coordinator": key}, str(file))


def _line(row: dict[str, Any]) -> str:
    from federated.deployment.steward.mandate_rows import how_it_stands

    return f"{row['study']}: {how_it_stands(row)}"
