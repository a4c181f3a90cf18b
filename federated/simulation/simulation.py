"""The silos of a simulation on one machine, and what only a simulation may do: read public silos in the clear."""

from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.events import Listener
from configs.identities import alike
from configs.schema.schema import RunConfig
from configs.schema.silo import LARGEST_NAME, SiloConfig
from federated.coordinator.parties import Parties
from federated.coordinator.rounds import run_federation
from federated.coordinator.schedule.quorum import check_names
from federated.coordinator.trusted_aggregator import open_ledger
from federated.identity.trust import COORDINATOR_KEY, coordinator_signer
from federated.silo.silo import Silo
from federated.silo.units import rows_of
from federated.simulation.local_grid import LocalGrid, OpenSilo
from federated.simulation.public_silo import PublicSilo, own_signer
from federated.simulation.simulated_places import (
    ledgers_of_other_spellings,
    refuse_earlier_place,
    simulated_ledger,
    simulated_silo,
)
from privacy.certificate.certificate import AGGREGATOR
from privacy.mechanism.streams import injected_seeds
from privacy.plan import PlanTerms
from privacy.plan_from_settings import plan_terms
from privacy.register import only_ledger


def simulated_silos(config: RunConfig, base_model: Path) -> dict[str, SiloConfig]:
    """The simulated silos by name, from the data's silo column; paths are absolute, so that any process can open them.

    Raises:
        InputError: a silo with a declared size or a rank of its own has no record, or there is no silo at all; names
            are too long, or differ in case alone; or a ledger's silo is now part of another one, whose ledger knows
            nothing of what was spent.
    """
    probe = simulated_silo(config, "probe", base_model)
    rows = rows_of(probe.data, config.federated.task_spec).by_silo
    missing = sorted(set(config.data.private.public_record_counts) - set(rows))
    if missing or not rows:
        raise InputError(
            f"data.private.source {config.data.private.source!r}: no record for silo {missing or 'at all'}, and for "
            f"{len(rows)} others; check data.private.silo and data.private.public_record_counts"
        )
    unknown = sorted(set(config.federated.lora_ranks) - set(rows))
    if unknown:
        raise InputError(f"federated.lora_ranks has {unknown}: none of the data's {len(rows)} silos; check the names")
    check_names(config.federated, rows)
    _check_names(config, rows)
    for name, folder in ledgers_of_other_spellings(config, rows).items():
        raise InputError(
            f"{folder}: this ledger's silo is silo {name!r} now, and a second budget for the same people is none; "
            "name them apart in the data, or take what they have spent from budget_epsilon and move the folder away"
        )
    return {name: simulated_silo(config, name, base_model) for name in sorted(rows)}


def _check_names(config: RunConfig, rows: Iterable[str]) -> None:
    """Refuses names that are texts, and those that differ in case alone: one silo would have several budgets."""
    for group in alike(rows):
        same = [name for name in group if [other.casefold() for other in group].count(name.casefold()) > 1]
        if same:
            raise InputError(
                f"data.private.silo is {config.data.private.silo!r}: {', '.join(map(repr, same))} differ in case "
                "alone; write each silo's name in one way, since every name has a budget of its own"
            )
    long = sorted(name for name in rows if len(name) > LARGEST_NAME)
    if long:
        raise InputError(
            f"data.private.silo is {config.data.private.silo!r}: {len(long)} of its names are longer than "
            f"{LARGEST_NAME} characters; give the column that names silos"
        )


def look_at_private(config: RunConfig) -> dict[str, Any]:
    """What whoever simulates should know of the silos' data before a run.

    Returns:
        Names of silos that differ in case, leading zeros or blanks inside alone, each with a budget of its own; and,
        where the source is a folder, which of its files are read.

    Raises:
        InputError: the data can't be read.
    """
    rows = rows_of(simulated_silo(config, "probe", Path("/")).data, config.federated.task_spec)
    files = rows.files and rows.files.note()
    return {"silos_that_look_alike": alike(rows.by_silo), **({"files_of_the_silos": files} if files else {})}


def simulate(
    ray: Any,
    config: RunConfig,
    base_model: Path,
    directory: Path,
    *,
    on_event: Listener,
    with_dp: bool = True,
    injected_seed: bytes | None = None,
) -> None:
    """Runs the federation of the settings over the local grid, to the end, from its newest commit.

    Args:
        ray: a running Ray.
        config: the run's settings.
        base_model: exported model directory.
        directory: the federation's own directory.
        on_event: receives the coordinator's events.
        with_dp: False runs the comparison without DP, for data declared public only.
        injected_seed: for tests: makes the silos' noise repeatable.
    """
    refuse_earlier_place(config)
    silos = simulated_silos(config, base_model)
    home, private = Path(config.federated.state_dir), config.data.private
    with nullcontext() if private.public else only_ledger(private.dataset_id, home, home / COORDINATOR_KEY):
        signer = coordinator_signer(home)
    trusted = frozenset({signer.public_key})
    if with_dp:
        opener: OpenSilo = partial(_open_silo, silos, trusted, injected_seed, _roster(config, silos))
    else:
        opener = partial(_open_comparison, silos, trusted, plan_terms(config))
    ledger = partial(
        open_ledger,
        home,
        simulated_ledger(config),
        private.dataset_id,
        config.privacy,
        injected_seeds(injected_seed, AGGREGATOR),
    )
    parties = Parties(signer, len(silos), open_ledger=ledger)
    processes, kept = config.federated.workers, config.federated.secure_aggregation
    with LocalGrid(ray, opener, silos, processes, config.cluster.threads_per_rank, kept=kept) as grid:
        run_federation(grid, config, base_model, directory, parties, on_event, certify=with_dp)


def _roster(config: RunConfig, silos: dict[str, SiloConfig]) -> dict[str, str] | None:
    """The simulated silos' own keys by name, where their stewards would have confirmed each other's."""
    if not config.federated.secure_aggregation:
        return None
    return {name: own_signer(silo).public_key for name, silo in silos.items()}


def _open_silo(
    silos: dict[str, SiloConfig],
    trusted: frozenset[str],
    injected_seed: bytes | None,
    roster: dict[str, str] | None,
    name: str,
) -> Silo:
    return Silo(silos[name], trusted, injected_seed, roster=roster)


def _open_comparison(silos: dict[str, SiloConfig], trusted: frozenset[str], plan: PlanTerms, name: str) -> "PublicSilo":
    return PublicSilo(silos[name], trusted, plan)
