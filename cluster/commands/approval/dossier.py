"""``siloweave dossier``."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.stages import JsonOption
from configs.errors import InputError
from configs.printing import answer


def dossier(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="A finished run's directory.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where to write; nothing may be there yet. Default: dossier/ in the run.")
    ] = None,
    verify: Annotated[Path | None, typer.Option(help="Instead: check the dossier in this folder.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Writes one folder for who has to approve that a model leaves, or checks such a folder, without a network.

    It says what was trained on whose data, what left each site and when, the guarantee, what it doesn't cover, and who
    signed. Each sentence names the signed field or the digest that it rests on.
    """
    if (run is None) == (verify is None) or (verify is not None and output is not None):
        raise InputError("dossier: give a run's directory, or --verify with a dossier's folder")
    from cluster.report.dossier.dossier import make
    from cluster.report.dossier.dossier import verify as check

    if verify is not None:
        found = check(verify)
        claim = f"epsilon {found['headline']['epsilon']:.4g}, delta {found['headline']['delta']:g}"
        line = f"{verify}: holds, {found['sentences']} sentences about run {found['run']}; {claim}"
        answer(as_json, found, line, f"digest {found['digest']}: compare it with what its maker reads out")
        return
    if run is not None:
        from cluster.finished import settings_of

        target, digest = make(settings_of(run), run, output)
        done = {"directory": str(target), "digest": digest}
        answer(as_json, done, f"dossier: {target / 'dossier.html'}; digest {digest}")
