"""``siloweave serve``."""

import os
import socket
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.stages import JsonOption, quiet_libraries
from configs.errors import InputError
from configs.printing import answer, say

_WAITING = 8  # requests that may wait, for each slot


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
        from cluster.serving.app import Service
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed; `pip install 'siloweave[serve]'`") from None
    from cluster.serving.models import ServedModel, find, load
    from configs.storage.sealing import ENVIRONMENT, FROM_ENVIRONMENT, load_key
    from trainer.inference.batching import Engine, EngineLimits

    keys = None if api_keys is None else ApiKeys(api_keys)
    listener = server.listen(host, port, timeout_s)  # before minutes of loading, and nobody else gets it meanwhile
    rpc_listener = None if grpc_port is None else server.listen(host, grpc_port, timeout_s, "--grpc-port")
    key = load_key(key_file or (FROM_ENVIRONMENT if os.environ.get(ENVIRONMENT) else ""))
    most = None if adapters_memory is None else adapters_memory * 2**20
    served = load([find(model, key) for model in models], key, most)
    writing = {name: one for name, one in served.items() if isinstance(one, ServedModel)}
    room = slots * max((model.context_length for model in writing.values()), default=1)
    engine = Engine({name: one.voice for name, one in writing.items()}, EngineLimits(slots, room, _WAITING * slots))
    service = Service(served, engine, keys, timeout_s, (1 + _WAITING) * slots)
    claims = {name: one.claim for name, one in served.items()}
    document = {
        "url": f"http://{_shown(listener)}",
        "models": {name: {"privacy": claim.document()} for name, claim in claims.items()},
    }
    lines = [f"{name}: {claim.line}" for name, claim in claims.items()]
    lines.append(f"serving at {document['url']}")
    beside: server.Beside = nullcontext
    if rpc_listener is not None:
        from cluster.serving.rpc import service as rpc

        document["grpc"] = address = _shown(rpc_listener)
        lines.append(f"serving gRPC at {address}")
        rpc_listener.close()  # which has kept the port: gRPC takes no socket that listens already
        beside = partial(rpc.serving, service, address)
    server.serve(service.guard, listener, timeout_s, lambda: answer(as_json, document, *lines), beside)
    engine.close()
    say("serve: stopped", err=True)


def _shown(listener: socket.socket) -> str:
    """Where it listens, as a part of a URL."""
    host, port, *_ = listener.getsockname()
    return f"{f'[{host}]' if ':' in host else host}:{port}"
