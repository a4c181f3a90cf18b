"""``siloweave ledger``: look at a ledger, and check it, without the silo."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

ledger_app = typer.Typer(help="Shows and verifies a silo's ledger.", no_args_is_help=True)
LedgerArgument = Annotated[Path, typer.Argument(help="A ledger.sqlite, or the state_dir that holds it.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@ledger_app.command()
def show(ledger: LedgerArgument, as_json: JsonOption = False) -> None:
    """Every entry, and what is left."""
    from privacy.chain import left

    bodies = _verified(ledger)
    remaining = left(bodies)
    if as_json:
        typer.echo(json.dumps({"entries": bodies, "epsilon_left": remaining.epsilon, "delta_left": remaining.delta}))
        return
    for body in bodies:
        when = datetime.fromtimestamp(body["time"], tz=UTC).strftime("%Y-%m-%d %H:%M:%S")
        typer.echo(f"{body['number']:>5}  {when}  {body['kind']:<8}{_summary(body)}")
    typer.echo(f"left: epsilon {remaining.epsilon:.4g}, delta {remaining.delta:.3g}")


@ledger_app.command()
def verify(ledger: LedgerArgument, as_json: JsonOption = False) -> None:
    """Replays numbers, chain, signatures and every reservation's epsilon. Exit status 2 where one doesn't hold."""
    from privacy.chain import left
    from privacy.replay import replay

    bodies = _verified(ledger)
    replay(bodies, str(ledger))
    remaining = left(bodies)
    result = {"entries": len(bodies), "sound": True, "epsilon_left": remaining.epsilon, "delta_left": remaining.delta}
    line = f"{ledger}: {len(bodies)} entries hold; left: epsilon {remaining.epsilon:.4g}, delta {remaining.delta:.3g}"
    typer.echo(json.dumps(result) if as_json else line)


def _verified(ledger: Path) -> list[dict[str, Any]]:
    from privacy.chain import verify_entries
    from privacy.ledger_file import LEDGER_FILE, read_only

    path = ledger / LEDGER_FILE if ledger.is_dir() else ledger
    return verify_entries(read_only(path), str(path))


def _summary(body: dict[str, Any]) -> str:
    hidden = {"kind", "number", "time", "plan", "public_key"}
    values = {name: value for name, value in body.items() if name not in hidden}
    return "  ".join(f"{name}={_short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 40 else str(value)
