"""``siloweave silo``: what a data steward runs."""

import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

silo_app = typer.Typer(help="Runs a silo at an edge site.", no_args_is_help=True)


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
    server = start(Silo(settings), socket)
    typer.echo(f"silo {settings.silo.id}: listening on {socket}")
    ended.wait()
    server.stop(grace=5).wait()
