"""``siloweave bundle``."""

from collections.abc import Iterable, Sequence
from importlib.metadata import Distribution
from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.stages import JsonOption
from configs.printing import answer


def bundle(
    federation: Annotated[Path, typer.Argument(help="The federation's folder, whose key signs the bundle.")],
    output: Annotated[Path, typer.Argument(help="Where to write; nothing may be there yet.")],
    model: Annotated[Path, typer.Option(help="The base model, as `siloweave export` wrote it.")],
    extra: Annotated[
        list[str] | None, typer.Option(help="An extra of siloweave that the sites need; may be repeated.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Makes a signed folder that a site without internet installs from. Nothing is fetched.

    It holds this environment's packages, the base model, units, documents, a bill of materials and checksums.
    """
    from rich.progress import track

    from cluster.monitoring.console import Terminal
    from federated.bundle.bundle import make_bundle
    from federated.bundle.packages import required
    from federated.deployment.federation_folder import FederationFolder
    from federated.identity.cards import fingerprint

    made = FederationFolder(federation)
    terminal = Terminal(stderr=True)
    packages = required("siloweave", tuple(extra or ()))

    def shown(found: Sequence[Distribution]) -> Iterable[Distribution]:
        return track(found, "packages", console=terminal, disable=not terminal.is_terminal)

    make_bundle(made, model, output, packages, shown)
    code = fingerprint(made.card)
    answer(
        as_json,
        {"directory": str(output), "packages": len(packages), "fingerprint": code},
        f"{output}: {len(packages)} packages, signed; bring it to the site, and read this out to its steward:",
        f"fingerprint {code}",
        f"there: sh install.sh {code} /opt/siloweave",
    )
