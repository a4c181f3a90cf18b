"""``siloweave silo``: what a data steward runs."""

import json
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from federated.personal_commands import personalise

if TYPE_CHECKING:
    from privacy.chain import Budget
    from privacy.journal import Journal

silo_app = typer.Typer(help="Runs a silo at an edge site.", no_args_is_help=True)
budget_app = typer.Typer(help="A silo's privacy budget.", no_args_is_help=True)
silo_app.add_typer(budget_app, name="budget")
silo_app.command()(personalise)


@silo_app.callback()
def silo() -> None:
    """Runs a silo at an edge site."""


@silo_app.command()
def serve(
    config: Annotated[Path, typer.Option("--config", "-c", help="The silo.toml.")],
    socket: Annotated[Path, typer.Option(help="Unix socket to listen on; only its owner can reach it.")],
) -> None:
    """Starts the silo's gRPC service, and runs until it is told to end (SIGTERM, Ctrl-C)."""
    from configs.silo import load_silo
    from federated.silo import Silo
    from federated.silo_service import serve as start

    settings = load_silo(config)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    server, _ = start(Silo(settings), f"unix:{socket}")
    typer.echo(f"silo {settings.silo.id}: listening on {socket}")
    ended.wait()
    server.stop(grace=5).wait()


@budget_app.callback()
def budget() -> None:
    """A silo's privacy budget."""


@budget_app.command()
def reconcile(
    silo: Annotated[Path, typer.Argument(help="The silo.toml, or the state_dir of a simulated silo.")],
    receipts: Annotated[
        list[Path] | None,
        typer.Argument(help="What coordinators hold: their certificate.json, or a round's silos.json."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Makes a ledger usable again that was put back: charges every spend that anchor and receipts prove and it lacks.

    Runs that are open are closed, because their lost charges are not known. Give the receipts of every coordinator:
    what nobody shows can't be charged. A run that is charged here and was reserved before the ledgers parted is charged
    once more for each receipt of a lost one: it may have released the same rounds there.
    """
    from privacy.reconcile import read_receipts
    from privacy.reconcile import reconcile as take_in

    journal, allowed = _journal(silo)
    found = [item for path in receipts or [] for item in read_receipts(path, journal.silo_id, journal.dataset_id)]
    done = take_in(journal, allowed, found)
    result = {
        "doubt": done.doubt,
        "epsilon_charged": sum(spend.epsilon for spend in done.spends),
        "delta_charged": sum(spend.delta for spend in done.spends),
        "reservations_charged_again": done.charged_again,
        "closed_runs": list(done.closed_runs),
        "epsilon_left": done.left.epsilon,
        "delta_left": done.left.delta,
    }
    remaining = f"left: epsilon {done.left.epsilon:.4g}, delta {done.left.delta:.3g}"
    line = f"{journal.path}: nothing to reconcile; {remaining}"
    if done.doubt is not None:
        line = (
            f"{journal.path}: reconciled with {done.receipts} receipts; "
            f"{len(done.spends) - done.charged_again} lost spends charged, "
            f"{done.charged_again} reservations charged again because their rounds may be released twice, together "
            f"epsilon {result['epsilon_charged']:.4g}; {len(done.closed_runs)} open runs closed; {remaining}"
        )
    typer.echo(json.dumps(result) if as_json else line)


def _journal(silo: Path) -> "tuple[Journal, Budget]":
    """The ledger of a silo.toml, or of a state directory, whose ledger says whose it is."""
    from configs.silo import load_silo
    from privacy.chain import Budget
    from privacy.journal import Journal, default_anchor_dir
    from privacy.reconcile import identity

    if silo.is_dir():
        silo_id, dataset_id, policy = identity(silo)
        state_dir = silo.absolute()
        return Journal(state_dir, default_anchor_dir(state_dir), silo_id, dataset_id), policy
    settings = load_silo(silo)
    state_dir = Path(settings.silo.state_dir)
    anchor_dir = Path(settings.silo.anchor_dir) if settings.silo.anchor_dir else default_anchor_dir(state_dir)
    policy = Budget(settings.policy.budget_epsilon, settings.policy.budget_delta)
    return Journal(state_dir, anchor_dir, settings.silo.id, settings.silo.dataset_id), policy
