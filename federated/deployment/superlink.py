"""The SuperLink on loopback: how it is started, and what the coordinator asks of its Control API."""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from configs.errors import SiloweaveError
from configs.parse import read_toml
from configs.storage.files import write_atomic
from federated.deployment.federation_folder import FederationFolder, node_key
from federated.deployment.flower_programs import BIN, LOOPBACK, flower_environment, without_proxy
from federated.deployment.ports import free_port
from federated.deployment.supervisor import Program
from federated.identity.cards import EnrolledSilo
from federated.transport.health import is_serving

if TYPE_CHECKING:
    from flwr.supercore.control import ControlHttpClient

APP = Path(__file__).parents[1] / "app"
LINK = "siloweave"  # the connection's name in Flower's settings
START_RUN_S = 120
DATABASE = "sqlite:///superlink.sqlite"  # in `state/`, where it runs: a `?` in a whole path would end its name


def superlink(federation: FederationFolder) -> tuple[Program, int]:
    """The SuperLink as a program of the supervisor, and its loopback port; writes Flower's connection file."""
    port, health = federation.config.superlink_port or free_port(), f"{LOOPBACK}:{free_port()}"
    certificates = federation.certificates
    link = {"address": f"{LOOPBACK}:{port}", "root-certificates": str(federation.authority.path)}
    content = tomli_w.dumps({"superlink": {"default": LINK, LINK: link}})
    write_atomic(federation.home / "config.toml", content.encode(), mode=0o600)
    command = (
        str(BIN / "flower-superlink"),
        *("--host", LOOPBACK, "--port", str(port)),
        *(
            "--ssl-certfile",
            str(certificates / "superlink.pem"),
            "--ssl-keyfile",
            str(federation.keys / "superlink.key"),
        ),
        *("--ssl-ca-certfile", str(federation.authority.path)),
        "--enable-supernode-auth",
        *("--database", DATABASE),
        "--disable-runtime-dependency-installation",
        *("--health-server-address", health),
    )
    environment = {**os.environ, **flower_environment(federation.home)}
    listens = ((LOOPBACK, port),)
    return Program("superlink", command, environment, lambda: is_serving(health), listens), port


@contextmanager
def control(federation: FederationFolder) -> "Iterator[ControlHttpClient]":
    """A client of the running SuperLink's Control API.

    Raises:
        SiloweaveError: the SuperLink doesn't answer.
    """
    import httpx
    from flwr.supercore.control import ControlHttpClient

    address = read_toml(federation.home / "config.toml")["superlink"][LINK]["address"]
    os.environ.update(without_proxy())
    client = ControlHttpClient.from_server_address(address, False, str(federation.authority.path), ())
    try:
        yield client
    except httpx.HTTPError as error:
        raise SiloweaveError(
            f"SuperLink at {address}: {error}; is `siloweave federation serve {federation.folder}` running?"
        ) from None
    finally:
        client.close()


def nodes(federation: FederationFolder, cards: Mapping[str, EnrolledSilo] | None = None) -> dict[str, dict[str, Any]]:
    """What the SuperLink knows of each silo's node: its id and whether it is online.

    Args:
        federation: the coordinator's, being served.
        cards: of the silos; None: of all that are enrolled.

    Raises:
        InputError: a card has no key.
        SiloweaveError: the SuperLink doesn't answer.
    """
    from flwr.proto.control_pb2 import ListNodesRequest

    with control(federation) as client:
        found = {node.public_key: node for node in client.ListNodes(ListNodesRequest()).nodes_info}
    cards = federation.silos() if cards is None else cards
    known = {name: found.get(_pem(card)) for name, card in cards.items()}
    return {name: {"node": node.node_id, "status": node.status} for name, node in known.items() if node is not None}


def reconcile(federation: FederationFolder) -> list[str]:
    """Makes the registered nodes those of the enrolled silos, without a restart of anything.

    Returns:
        Enrolled silos whose nodes Flower takes no more: it has unregistered them before.

    Raises:
        InputError: a card has no key.
        SiloweaveError: the SuperLink doesn't answer.
    """
    from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest

    wanted = {_pem(card): name for name, card in federation.silos().items()}
    with control(federation) as client:
        known = {node.public_key: node for node in client.ListNodes(ListNodesRequest()).nodes_info}
        gone = {key for key, node in known.items() if node.status == "unregistered"}
        for key in known.keys() - gone - wanted.keys():
            client.UnregisterNode(UnregisterNodeRequest(node_id=known[key].node_id))
        for key in wanted.keys() - known.keys():
            client.RegisterNode(RegisterNodeRequest(public_key=key, name=wanted[key]))
    return sorted(wanted[key] for key in gone & wanted.keys())


def _pem(card: EnrolledSilo) -> bytes:
    """The public key of a silo's relay as Flower keeps it."""
    return node_key(card).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def start_run(federation: FederationFolder, settings: Path) -> int:
    """Hands Flower's bundle and a run's settings (a TOML file) to the SuperLink and gives Flower's number of the run.

    Raises:
        SiloweaveError: Flower refuses.
    """
    command = [str(BIN / "flwr"), "run", str(APP), LINK, "--run-config", str(settings), "--format", "json"]
    environment = {**os.environ, **flower_environment(federation.home)}
    done = subprocess.run(  # noqa: S603  (our own command line)
        command,
        env=environment,
        cwd=federation.state,
        capture_output=True,
        text=True,
        timeout=START_RUN_S,
        check=False,
    )
    try:
        answer = json.loads(done.stdout[done.stdout.index("{") :])
        return int(answer["run-id"])
    except (ValueError, KeyError, TypeError):
        said = " ".join((done.stdout + done.stderr).split())[-500:]
        raise SiloweaveError(f"`flwr run` failed: {said}") from None


def run_status(federation: FederationFolder, flower_run: int) -> tuple[str, str]:
    """Flower's status of a run (``pending``, ``starting``, ``running``, ``finished``) and its details."""
    from flwr.proto.control_pb2 import ListRunsRequest

    with control(federation) as client:
        runs = client.ListRuns(ListRunsRequest(run_id=flower_run)).run_dict
    run = runs.get(flower_run)
    return (
        ("finished", "unknown")
        if run is None
        else (run.status.status, f"{run.status.sub_status}: {run.status.details}")
    )


def stop_run(federation: FederationFolder, flower_run: int) -> None:
    """Ends a run in Flower's books; one that has ended stays as it is."""
    from flwr.proto.control_pb2 import StopRunRequest

    if run_status(federation, flower_run)[0] != "finished":
        with control(federation) as client:
            client.StopRun(StopRunRequest(run_id=flower_run))
