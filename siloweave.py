"""The front door: parses and calls one function a command. ``python -m siloweave`` works as well."""

import os
import signal
import sys
import traceback
from contextlib import suppress
from typing import Annotated

import typer

from cluster.commands import federation as federation_command
from cluster.commands import stages as cluster_commands
from cluster.commands.approval.bundle import bundle
from cluster.commands.approval.dossier import dossier
from cluster.commands.chat import chat
from cluster.commands.evaluate import evaluate
from cluster.commands.explain import explain
from cluster.commands.exporting.onnx import onnx
from cluster.commands.fitting.calibrate import calibrate
from cluster.commands.generate import generate
from cluster.commands.jobs import job_app, submit
from cluster.commands.merge import merge
from cluster.commands.optimise import optimise
from cluster.commands.predict import predict
from cluster.commands.serve import serve
from cluster.commands.synthesis.synthesise import synthesise
from cluster.commands.tune import tune
from configs.ending import ended_by_signals
from configs.errors import SiloweaveError
from configs.printing import escape_unencodable, say, to_json
from federated.commands.federation import federation_app
from federated.commands.silo import silo_app
from privacy.commands import ledger_app

_ENDED = {128 + number: number.name for number in (signal.SIGINT, signal.SIGTERM)}

app = typer.Typer(
    name="siloweave",
    help="Trains language models where the data may not move.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cluster_commands.add_to(app)
app.command()(evaluate)
app.command()(chat)
app.command()(explain)
app.command()(generate)
app.command()(predict)
app.command()(merge)
app.command()(optimise)
app.command()(calibrate)
app.command()(onnx)
app.command()(dossier)
app.command()(bundle)
app.command()(serve)
app.command()(synthesise)
app.command()(tune)
app.command()(submit)
app.add_typer(job_app, name="job")
app.add_typer(ledger_app, name="ledger")
silo_app.command()(federation_command.attack)
silo_app.command("dashboard")(federation_command.silo_dashboard)
app.add_typer(silo_app, name="silo")
federation_app.command()(federation_command.run)
federation_app.command()(federation_command.rehearse)
federation_app.command("dashboard")(federation_command.federation_dashboard)
app.add_typer(federation_app, name="federation")


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
) -> None:
    """Options of every command."""
    os.environ["SILOWEAVE_DEBUG"] = "1" if debug else ""


def main() -> None:
    """Runs a command.

    Exit status: 0, 1 the run failed, 2 the input is wrong, 3 refused by a privacy policy; 130 and 143 where a signal
    ended it.
    """
    escape_unencodable()
    try:
        with ended_by_signals():
            app()
    except SystemExit as ended:
        if ended.code in _ENDED:
            _tell(f"ended by {_ENDED[ended.code]}; what was committed is kept", err=True)
        raise
    except Exception as error:
        sys.exit(_failed(error))


def _failed(error: Exception) -> int:
    if os.environ.get("SILOWEAVE_DEBUG"):
        _tell(*traceback.format_exc().splitlines(), err=True)
    known = isinstance(error, SiloweaveError)
    status = error.exit_status if isinstance(error, SiloweaveError) else 1
    message = str(error) if known else f"{type(error).__name__}: {error} (--debug shows where)"
    line = " ".join(message.split())
    _tell(f"error: {line}", err=True)
    if "--json" in sys.argv:
        _tell(to_json({"error": line, "exit_status": status}))
    return status


def _tell(*lines: str, err: bool = False) -> None:
    """Says it where that can be written; elsewhere the exit status alone says it."""
    with suppress(SiloweaveError, OSError):
        say(*lines, err=err)


if __name__ == "__main__":
    main()
