"""``siloweave silo``: what a data steward runs."""

from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from configs.imports import import_large
from configs.printing import FIGURES, answer, confirmed, rounded, say
from federated.commands.mandates import mandate_app
from federated.commands.silo_runs import found_journal, journal_of, runs_app
from federated.deployment.supervisor import ended_by_signal

if TYPE_CHECKING:
    from privacy.ledger.chain import Budget
    from privacy.ledger.journal import Journal


SiloToml = Annotated[Path, typer.Option("--config", "-c", help="The silo.toml.")]
silo_app = typer.Typer(help="Runs a silo at an edge site.", no_args_is_help=True)
budget_app = typer.Typer(help="A silo's privacy budget.", no_args_is_help=True)
silo_app.add_typer(budget_app, name="budget")
silo_app.add_typer(runs_app, name="runs")
silo_app.add_typer(mandate_app, name="mandate")


@silo_app.callback()
def silo() -> None:
    """Runs a silo at an edge site."""


@silo_app.command()
def init(
    config: SiloToml,
    relay: Annotated[Path, typer.Option(help="relay.json, which `siloweave silo relay --init` made.")],
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name or address of the service, where the relay runs on another machine; may be repeated."),
    ] = None,
) -> None:
    """Makes the silo's keys and certificates, where they are missing, and enrolment.json for the coordinator."""
    from configs.schema.addresses import check_reachable
    from configs.schema.silo import load_silo
    from configs.storage.layout import SiloFiles
    from federated.deployment.silo_site import check_new_id, make_identity
    from federated.identity.cards import RelayCard, fingerprint, read_document

    hosts = tuple(check_reachable(name, "--host") for name in host or ["localhost"])
    settings, card_of_relay = load_silo(config), read_document(RelayCard, relay)
    check_new_id(settings)
    card = make_identity(settings, journal_of(settings), card_of_relay, hosts)
    enrolment = SiloFiles(Path(settings.silo.state_dir)).enrolment
    say(f"silo {card.silo}: send {enrolment} to the coordinator, and read this out:")
    say(f"fingerprint {fingerprint(card)}")


@silo_app.command()
def trust(
    config: SiloToml,
    coordinator: Annotated[Path, typer.Argument(help="The coordinator.json that the coordinator sent.")],
    fingerprint: Annotated[
        str | None, typer.Option(help="The fingerprint that its people read out; without it you are asked.")
    ] = None,
) -> None:
    """Answers this coordinator's requests from now on."""
    from configs.schema.silo import load_silo
    from federated.deployment.silo_site import trust as take_in
    from federated.identity.cards import CoordinatorCard, confirm, read_document

    card = read_document(CoordinatorCard, coordinator)
    found = confirm(card, fingerprint, str(coordinator), confirmed)
    take_in(load_silo(config), card)
    say(f'{card.name}: trusted from now on; its relay\'s settings say coordinator_fingerprint = "{found}"')


@silo_app.command()
def distrust(
    config: SiloToml,
    name: Annotated[str, typer.Argument(help="The coordinator's name, as `silo status` shows it.")],
) -> None:
    """Refuses this coordinator's requests from now on. What was charged stays charged."""
    from configs.schema.silo import load_silo
    from federated.deployment.silo_site import distrust as leave_out

    leave_out(load_silo(config), name)
    say(f"{name}: not trusted any more")


@silo_app.command()
def roster(
    config: SiloToml,
    add: Annotated[Path | None, typer.Option(help="enrolment.json of another silo, which its steward sent.")] = None,
    fingerprint: Annotated[
        str | None, typer.Option(help="The fingerprint that its steward read out; without it you are asked.")
    ] = None,
    remove: Annotated[str | None, typer.Option(help="Name of a silo that is to be known no longer.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print for machines.")] = False,
) -> None:
    """The other silos with which this one adds updates up under masks (secure aggregation), as you confirm them.

    A run's own roster has to be the same. Without options it shows which they are.
    """
    from configs.errors import InputError
    from configs.schema.silo import load_silo
    from federated.deployment.silo_site import confirm_silo, drop_silo
    from federated.deployment.silo_site import roster as known
    from federated.identity.cards import EnrolledSilo, confirm, read_document

    if add is not None and remove is not None:
        raise InputError("silo roster: give --add or --remove, one at a time")
    if fingerprint is not None and add is None:
        raise InputError("silo roster: --fingerprint is of the silo that --add names; give both")
    settings = load_silo(config)
    if add is not None:
        card = read_document(EnrolledSilo, add)
        confirm(card, fingerprint, str(add), confirmed)
        confirm_silo(settings, card)
    if remove is not None:
        drop_silo(settings, remove)
    found = known(settings)
    answer(as_json, found, *[f"{name}: {digits}" for name, digits in found.items()] or ["no other silo is known"])


@silo_app.command()
def serve(
    config: SiloToml,
    socket: Annotated[
        Path | None, typer.Option(help="Unix socket to listen on, for the relay's group and nobody else.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="HOST:PORT to listen on by mutual TLS, for a relay on another machine.")
    ] = None,
) -> None:
    """Starts the silo's gRPC service, and runs until it is told to end (SIGTERM, Ctrl-C)."""
    from configs.errors import InputError
    from configs.schema.silo import load_silo
    from configs.storage.layout import SiloFiles
    from federated.deployment.ports import check_place
    from federated.deployment.separation.separation import check_separation, share_socket

    if (socket is None) == (address is None):
        raise InputError("silo serve: give --socket for a relay on this machine, or --address for one on another")
    place = check_place(socket, address)
    settings = load_silo(config)
    relay_user = settings.silo.relay_user
    if relay_user:
        check_separation(settings, config)
    elif socket and not settings.data.public:
        raise InputError(
            f"{config}: silo.relay_user is empty; name the operating-system user of the relay, which runs code that "
            "comes from elsewhere"
        )
    import_large("federated.silo.silo")
    from federated.deployment.silo_site import service_tls
    from federated.silo.silo import Silo
    from federated.silo.source_record import source_note
    from federated.transport.service import serve as start
    from privacy.register import only_ledger

    ended, files = ended_by_signal(), SiloFiles(Path(settings.silo.state_dir))
    known = only_ledger(settings.silo.dataset_id, files.directory, files.key)
    with nullcontext() if settings.data.public else known:
        silo = Silo(settings, file=config.absolute())
    newer = source_note(settings)
    # Before the first request, whose time would tell how much text there is.
    notes = [note for note in (*silo.workbench.notes, newer, silo.workbench.device_note()) if note]
    answers = partial(start, silo.handle, settings.policy.max_request_bytes)
    server, _ = answers(place) if socket else answers(place, service_tls(settings))
    if socket and relay_user:
        share_socket(socket, relay_user)
    say(f"silo {settings.silo.id}: listening on {socket or address}; its ledger is {files.ledger}", *notes)
    ended.wait()
    server.stop(grace=5).wait()


@silo_app.command()
def relay(
    config: Annotated[Path, typer.Option("--config", "-c", help="The relay.toml.")],
    make_keys: Annotated[bool, typer.Option("--init", help="Make the relay's keys and relay.json, and end.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Look at the way to the coordinator: proxy, certificate, clock; and end.")
    ] = False,
) -> None:
    """Runs the silo's SuperNode and restarts it when it dies, until told to end. As another user than the service."""
    from configs.schema.deployment import load_relay
    from federated.deployment.line.site_proxy import UnreachableError
    from federated.deployment.relay import look, supernode
    from federated.deployment.relay import make_keys as make
    from federated.deployment.supervisor import Supervisor

    settings = load_relay(config)
    folder = Path(settings.state_dir)
    if make_keys:
        make(settings)
        say(f"{folder / 'relay.json'}: give it to `siloweave silo init --relay`")
        return
    if check:
        say(look(settings))
        return
    program = supernode(settings)
    try:
        look(settings)
    except UnreachableError as error:  # the SuperNode tries again, as long as it takes
        say(f"{error}; tried again until it answers", err=True)
    address = settings.silo_address
    Supervisor(folder, [program]).run(
        ended_by_signal(), ready=lambda: say(f"relay to {address}: running"), tick=lambda: None
    )


@silo_app.command()
def status(
    config: Annotated[Path, typer.Option("--config", "-c", help="The silo.toml, or the relay.toml.")],
    socket: Annotated[Path | None, typer.Option(help="The service's socket, to ask whether it is serving.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print for machines.")] = False,
) -> None:
    """What the silo, or its relay, is doing: health, budget left, open runs, mandates, trust, certificates."""
    from configs.parse import read_toml
    from configs.schema.silo import load_silo
    from federated.deployment.silo_status import lines, relay_status, silo_status
    from federated.deployment.steward.ledger_look import look

    if "silo" in read_toml(config):
        settings = load_silo(config)
        found = silo_status(settings, look(settings), socket)
    else:
        found = relay_status(config)
    answer(as_json, found, *lines(found))


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
    """Makes a ledger that was put back usable again: charges all that anchor and receipts prove and that it lacks.

    Runs that are open are closed, because their lost charges are not known. Give the receipts of every coordinator:
    what nobody shows can't be charged. A run that is charged here and was reserved before the ledgers parted is charged
    once more for each receipt of a lost one: it may have released the same rounds there.
    """
    from privacy.ledger.reconcile import read_receipts
    from privacy.ledger.reconcile import reconcile as take_in

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
    answer(as_json, result, line)


def _journal(silo: Path) -> "tuple[Journal, Budget]":
    """The ledger of a silo.toml, or of a state directory, whose ledger says whose it is; it may be lost."""
    from configs.schema.silo import load_silo
    from privacy.ledger.chain import Budget
    from privacy.ledger.journal import Journal, default_anchor_dir
    from privacy.ledger.reconcile import identity

    if silo.is_dir():
        silo_id, dataset_id, policy = identity(silo)
        state_dir = silo.absolute()
        return Journal(state_dir, default_anchor_dir(state_dir), silo_id, dataset_id), policy
    settings = load_silo(silo)
    return found_journal(settings, mend=True), Budget(settings.policy.budget_epsilon, settings.policy.budget_delta)


@silo_app.command()
def personalise(
    config: Annotated[Path, typer.Option("--config", "-c", help="The silo.toml.")],
    adapter: Annotated[Path, typer.Option(help="What is shared: adapter/ or model/ of a finished federation.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Training units per step.")] = 16,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of AdamW.")] = 1e-3,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the personal adapter.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Trains an adapter for this silo alone, on top of the shared one.

    It is trained without noise: it stays in the state directory, has no guarantee, and its outputs are private data.
    """
    from configs.schema.silo import load_silo
    from federated.silo.personal import PersonalSettings
    from federated.silo.personal import personalise as train

    silo = load_silo(config)
    settings = PersonalSettings(steps, batch_size, learning_rate, rank, 2.0 * rank, silo.silo.micro_batch_size)
    result = train(silo, adapter, settings)
    answer(
        as_json,
        {**asdict(result), "folder": str(result.folder)},
        f"silo {silo.silo.id}: {result.folder}: held-out {FIGURES[result.figure]} "
        f"{rounded(result.shared)} with the shared adapter, "
        f"{rounded(result.personal)} with the personal one; adapter and figures are private",
    )
