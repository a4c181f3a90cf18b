"""``siloweave federation``: what a coordinator's people run, but for ``run``, which is in ``cluster/commands``."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.printing import answer, confirmed, say

if TYPE_CHECKING:
    from federated.deployment.federation_folder import FederationFolder

federation_app = typer.Typer(help="Runs a federation over silos elsewhere.", no_args_is_help=True)
Folder = Annotated[Path, typer.Argument(help="The federation's folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print for machines.")]


@federation_app.callback()
def federation() -> None:
    """Runs a federation over silos elsewhere."""


@federation_app.command()
def init(
    folder: Folder,
    name: Annotated[str, typer.Option(help="The federation's name, as silos see it.")],
    host: Annotated[list[str], typer.Option(help="Name or address by which silos reach it; may be repeated.")],
    port: Annotated[int, typer.Option(help="Port of the proxy, the only one that silos reach.")] = 9092,
    listen: Annotated[str, typer.Option(help="Address that the proxy listens on.")] = "0.0.0.0",  # noqa: S104
    advertise: Annotated[
        str, typer.Option(help="HOST:PORT by which silos reach it, behind NAT or a load balancer.")
    ] = "",
) -> None:
    """Makes a coordinator's keys, its certificates and coordinator.json for the silos."""
    from configs.parse import parse
    from configs.schema.deployment import FederationConfig
    from federated.deployment.federation_folder import FederationFolder
    from federated.identity.cards import fingerprint

    given = {"name": name, "hosts": host, "port": port, "listen": listen, "advertise": advertise}
    made = FederationFolder.create(folder, parse(FederationConfig, given, "federation init"))
    say(f"{made.card_file}: send it to every silo, and read this out to its steward:")
    say(f"fingerprint {fingerprint(made.card)}")


@federation_app.command()
def enrol(
    folder: Folder,
    enrolment: Annotated[Path, typer.Argument(help="The enrolment.json that the silo sent.")],
    fingerprint: Annotated[
        str | None, typer.Option(help="The fingerprint that its steward read out; without it you are asked.")
    ] = None,
) -> None:
    """Enrols a silo; nothing has to be restarted."""
    from federated.deployment.federation_folder import FederationFolder
    from federated.identity.cards import EnrolledSilo, confirm, read_document

    card = read_document(EnrolledSilo, enrolment)
    confirm(card, fingerprint, str(enrolment), confirmed)
    FederationFolder(folder).enrol(card)
    say(f"silo {card.silo}: enrolled; it takes part from a run's next round on")


@federation_app.command()
def revoke(folder: Folder, silo: Annotated[str, typer.Argument(help="The silo's name.")]) -> None:
    """Removes a silo; nothing has to be restarted."""
    from federated.deployment.federation_folder import FederationFolder

    FederationFolder(folder).revoke(silo)
    say(f"silo {silo}: revoked")


@federation_app.command()
def serve(folder: Folder) -> None:
    """Starts SuperLink and proxy and restarts what dies, until it is told to end (SIGTERM, Ctrl-C)."""
    from federated.deployment.federation_folder import FederationFolder
    from federated.deployment.proxy import proxy
    from federated.deployment.superlink import superlink
    from federated.deployment.supervisor import Supervisor, ended_by_signal
    from federated.identity.cards import fingerprint

    served = FederationFolder(folder)
    served.renew_certificates()
    if served.renew_card():
        say(f"{served.card_file}: changed by the settings; send it to every silo, and read this out to its steward:")
        say(f"fingerprint {fingerprint(served.card)}")
    link, port = superlink(served)
    supervisor = Supervisor(served.state, [link, proxy(served, port)])
    address = served.card.address
    supervisor.run(ended_by_signal(), lambda: say(f"federation at {address}: serving"), _enrolments(served))


def _enrolments(served: "FederationFolder") -> "Callable[[], None]":
    """Registers and unregisters nodes when the enrolled silos have changed; a SuperLink that is away is asked later."""
    from configs.errors import SiloweaveError
    from federated.deployment.federation_folder import FRESH
    from federated.deployment.superlink import reconcile

    registered: dict[str, Any] | None = None
    said = ""

    def tick() -> None:
        nonlocal registered, said
        try:
            wanted = served.silos()
            if wanted != registered:
                for name in reconcile(served):
                    say(
                        f"enrolments: silo {name}: its relay's key was revoked before; revoke it, and {FRESH}", err=True
                    )
                registered, said = wanted, ""
        except SiloweaveError as error:
            if str(error) != said:  # not twice a second
                said = str(error)
                say(f"enrolments: {said}", err=True)

    return tick


@federation_app.command()
def status(folder: Folder, as_json: JsonOption = False) -> None:
    """Processes, silos and their budgets, the run's round, refusals with their reasons."""
    from federated.deployment.federation_folder import FederationFolder
    from federated.deployment.federation_status import lines
    from federated.deployment.federation_status import status as look

    found = look(FederationFolder(folder))
    answer(as_json, found, *lines(found))


@federation_app.command()
def stop(folder: Folder) -> None:
    """Ends `federation serve` and all that it started. A run that is given again goes on from its newest round."""
    from federated.deployment.federation_folder import FederationFolder
    from federated.deployment.supervisor import stop as end

    ended = end(FederationFolder(folder).state)
    say("stopped" if ended else "nothing was running")
