"""``siloweave tune``."""

from typing import Annotated, Any

import typer

from cluster.commands import stages
from configs.errors import InputError
from configs.load import load
from configs.locks import working_on
from configs.printing import say, to_json
from configs.run_directory import run_directory


def tune(
    config: stages.ConfigOption = "demo",
    override: stages.SetOption = None,
    param: Annotated[
        list[str] | None,
        typer.Option(
            help="A setting to search: group.field=uniform|loguniform|randint|lograndint(LOW,HIGH) or choice(A,B,...)."
        ),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Number of trials; more extend a search.")] = 8,
    metric: Annotated[
        str,
        typer.Option(help="What is minimised. Default: validation_loss, or a federation's held-out figure."),
    ] = "",
    max_parallel: Annotated[
        int, typer.Option(min=0, help="Most trials at once. Default: as many as there is room for.")
    ] = 0,
    address: stages.AddressOption = "",
    as_json: stages.JsonOption = False,
) -> None:
    """Searches settings with Ray Tune, bad pretraining trials stopped early; continues when given again."""
    from cluster.tuning import search as tuning
    from cluster.tuning.search_space import parse_parameters

    settings = load(config, stages.overrides(override, address))
    _check_installed()
    with working_on(run_directory(settings)):  # before the search reads what another one may be writing
        search = tuning.Search(settings, parse_parameters(param or []), trials, metric)

        def work(run: Any) -> dict[str, Any]:
            return tuning.tune(run, search, max_parallel)

        document, _ = stages.with_run(settings, work, as_json)
    if as_json:
        say(to_json(document))
        return
    from cluster.monitoring.console import Terminal

    Terminal().print(tuning.table(document))
    for silo, price in (document["reserved"] or {}).items():
        say(f"silo {silo}: the search reserved epsilon {price['epsilon']:.4g}, delta {price['delta']:.3g}")
    say(f"best: {document['best_config']}; all trials: {search.path}, trials.svg")


def _check_installed() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("pandas", "pyarrow", "fsspec", "requests") if find_spec(name) is None]
    if missing:
        raise InputError(f"tune: Ray Tune needs {', '.join(missing)}; pip install 'siloweave[tune]'")
