"""``siloweave serve``."""

import socket
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.commands.stages import JsonOption, quiet_libraries
from configs.errors import InputError
from configs.printing import answer, say

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cluster.serving.claims import Claim
    from cluster.serving.keys import ApiKeys
    from cluster.serving.replicas.offer import Offer


def serve(  # noqa: PLR0913, PLR0917  # a command's options are its arguments
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="A run's directory, an adapter/ or a model/ in one, or a merged model; NAME=PATH gives it a name. "
            "Several adapters on one base share its weights.",
        ),
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen at. Beyond this machine it takes --api-keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one, which is printed.")] = 8000,
    grpc_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="The same operations over gRPC, too; 0 takes a free one. Default: not."),
    ] = None,
    api_keys: Annotated[
        Path | None, typer.Option(help="File, mode 0600, with one API key a line. Default: nobody needs one.")
    ] = None,
    slots: Annotated[
        int, typer.Option(min=1, max=1024, help="Requests that are decoded together; 8 times as many may wait.")
    ] = 8,
    timeout_s: Annotated[
        float, typer.Option(min=1, max=86_400, help="Longest that an answer may take, also after SIGTERM.")
    ] = 300,
    adapters_memory: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="MIB",
            help="Memory for the adapters on one base. Each is read when it is asked for; the one asked for "
            "longest ago makes room. Default: all stay.",
        ),
    ] = None,
    replicas: Annotated[
        int,
        typer.Option(
            min=0,
            max=1024,
            help="Processes that serve the same models, by Ray Serve on the Ray of RAY_ADDRESS, else on one of this "
            "command's own. Slots are those of each. Default: this process alone.",
        ),
    ] = 0,
    cpus: Annotated[
        int, typer.Option("--replica-cpus", min=1, max=1024, help="CPUs that each replica reserves; its threads.")
    ] = 1,
    key_file: Annotated[
        str, typer.Option(help="Key of encrypted runs. Default: SILOWEAVE_ENCRYPTION_KEY, where it is set.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Serves models that write, to OpenAI's clients: /v1/chat/completions, /v1/completions, /v1/models.

    Models that give labels, or find answers in a text, answer records at /predict.

    Exit status 0 after SIGTERM or Ctrl-C, when what was accepted is answered.
    """
    from cluster.serving.keys import LOOPBACK, ApiKeys

    quiet_libraries()
    if host not in LOOPBACK and api_keys is None:
        raise InputError(f"--host {host}: others reach the service there, and nobody needs a key; give --api-keys too")
    try:
        from cluster.serving import server
        from cluster.serving.replicas.offer import Offer
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed; `pip install 'siloweave[serve]'`") from None
    keys = None if api_keys is None else ApiKeys(api_keys)
    if replicas and grpc_port is not None:
        raise InputError("--grpc-port: replicas are asked over HTTP alone; leave it out, or --replicas")
    most = None if adapters_memory is None else adapters_memory * 2**20
    offer = Offer(tuple(models), slots, timeout_s, most, str(Path(key_file).resolve()) if key_file else "")
    listener = server.listen(host, port, timeout_s)  # before minutes of loading, and nobody else gets it meanwhile
    rpc_listener = None if grpc_port is None else server.listen(host, grpc_port, timeout_s, "--grpc-port")
    if replicas:
        _by_replicas(offer.everywhere(), keys, listener, replicas, cpus, as_json)
    else:
        _here(offer, keys, listener, rpc_listener, as_json)
    say("serve: stopped", err=True)


def _here(
    offer: "Offer", keys: "ApiKeys | None", listener: socket.socket, rpc_listener: socket.socket | None, as_json: bool
) -> None:
    from cluster.serving import server
    from cluster.serving.replicas.offer import service_of

    service = service_of(offer, keys)
    document, lines = _about(service.claims, listener)
    beside: server.Beside = nullcontext
    if rpc_listener is not None:
        from cluster.serving.rpc import service as rpc

        document["grpc"] = address = _shown(rpc_listener)
        lines.append(f"serving gRPC at {address}")
        rpc_listener.close()  # which has kept the port: gRPC takes no socket that listens already
        beside = partial(rpc.serving, service, address)
    server.serve(service.guard, listener, offer.timeout_s, lambda: answer(as_json, document, *lines), beside)
    service.close()


def _by_replicas(
    offer: "Offer", keys: "ApiKeys | None", listener: socket.socket, count: int, cpus: int, as_json: bool
) -> None:
    from cluster.serving import server
    from cluster.serving.replicas.door import Door
    from cluster.serving.replicas.running import replicas

    claims = {place.name: place.claim for place in offer.places()}  # what is wrong is said before anything is started
    document, lines = _about(claims, listener)
    with replicas(offer, count, cpus) as (handle, office):
        door = Door(handle, office, claims, keys, offer.timeout_s, offer.most * count, count)
        server.serve(door.guard, listener, offer.timeout_s, lambda: answer(as_json, document, *lines))


def _about(claims: "Mapping[str, Claim]", listener: socket.socket) -> tuple[dict[str, Any], list[str]]:
    from cluster.serving.claims import documents

    document = {"url": f"http://{_shown(listener)}", "models": documents(claims)}
    return document, [*(f"{name}: {claim.line}" for name, claim in claims.items()), f"serving at {document['url']}"]


def _shown(listener: socket.socket) -> str:
    """Where it listens, as a part of a URL."""
    host, port, *_ = listener.getsockname()
    return f"{f'[{host}]' if ':' in host else host}:{port}"
