"""``siloweave merge``."""

import os
from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.stages import JsonOption, quiet_libraries
from configs.printing import answer


def merge(
    place: Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run's directory, or an adapter/ in one.")],
    output: Annotated[
        Path | None, typer.Option(help="Where to write; nothing may be there yet. Default: merged/ in the run.")
    ] = None,
    key_file: Annotated[
        str, typer.Option(help="Key of an encrypted run. Default: SILOWEAVE_ENCRYPTION_KEY, where it is set.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Writes the base model with a finished federation's adapter in it, as a Hugging Face directory.

    It loads without Siloweave and without peft. Of an encrypted run it is encrypted, too; see `siloweave decrypt`.
    """
    quiet_libraries()
    from configs.storage.sealing import ENVIRONMENT, FROM_ENVIRONMENT, load_key
    from federated.adapters.merged import merge as write

    key = load_key(key_file or (FROM_ENVIRONMENT if os.environ.get(ENVIRONMENT) else ""))
    target, manifest = write(place, output, key)
    done = {"directory": str(target), "digest": manifest.content_digest, "inputs": manifest.inputs}
    answer(as_json, done, f"merge: the merged model is in {target}")
