"""The front door: parses and calls one function a command. ``python -m siloweave`` works as well."""

import os
import sys
import traceback
from typing import Annotated

import typer

from cluster.commands import federation as federation_command
from cluster.commands import stages as cluster_commands
from cluster.commands.jobs import job_app, submit
from cluster.commands.tune import tune
from configs.errors import SiloweaveError
from configs.printing import say, to_json
from federated.commands.federation import federation_app
from federated.commands.silo import silo_app
from privacy.commands import ledger_app

app = typer.Typer(
    name="siloweave",
    help="Trains language models where the data may not move.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cluster_commands.add_to(app)
app.command()(tune)
app.command()(submit)
app.add_typer(job_app, name="job")
app.add_typer(ledger_app, name="ledger")
app.add_typer(silo_app, name="silo")
federation_app.command()(federation_command.run)
app.add_typer(federation_app, name="federation")


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
) -> None:
    """Options of every command."""
    os.environ["SILOWEAVE_DEBUG"] = "1" if debug else ""


def main() -> None:
    """Runs a command. Exit status: 0, 1 the run failed, 2 the input is wrong, 3 refused by a privacy policy."""
    try:
        app()
    except Exception as error:
        if os.environ.get("SILOWEAVE_DEBUG"):
            say(*traceback.format_exc().splitlines(), err=True)
        status = error.exit_status if isinstance(error, SiloweaveError) else 1
        message = (
            str(error)
            if isinstance(error, SiloweaveError)
            else f"{type(error).__name__}: {error} (--debug shows where)"
        )
        line = " ".join(message.split())
        if "--json" in sys.argv:
            say(to_json({"error": line, "exit_status": status}))
        say(f"error: {line}", err=True)
        sys.exit(status)


if __name__ == "__main__":
    main()
