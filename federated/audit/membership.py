"""Membership inference against the final models, on silos declared public. Every figure is ``simulation_only``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.errors import PolicyRefusal
from configs.schema.schema import RunConfig
from configs.schema.silo import SiloConfig
from federated.coordinator.final_model import final_model
from federated.silo.units import Rows, units_of
from federated.simulation.simulation import simulated_silos
from privacy.audit.attacks import membership_figures
from trainer.scoring.record_losses import record_losses
from trainer.tasks.task import Encoded, Task, task_of


def infer_membership(config: RunConfig, base_model: Path, federations: Mapping[str, Path]) -> dict[str, Any]:
    """Attacks each federation's final model with training and held-out records of all silos, read in the clear.

    Two attacks: by the record's loss (Yeom et al. 2018), and by how far training lowered it from the public base model,
    which stands for the reference models of Carlini et al. 2022.

    Args:
        config: the run's settings.
        base_model: exported model directory.
        federations: directories of finished federations, by name.

    Returns:
        {"simulation_only": True, federation: {"loss": figures, "loss_against_base": figures}}

    Raises:
        PolicyRefusal: the data is not declared public.
    """
    if not config.data.private.public:
        raise PolicyRefusal(
            "membership inference: reads the silos' records one by one and needs data declared "
            "data.private.public = true",
            rule="public",
            asked="losses of single records",
            allowed="data declared public",
        )
    task = task_of(config.federated.task_spec, base_model)
    members, others = _records(simulated_silos(config, base_model), task, config.evaluate.max_records_per_silo)
    return {
        "simulation_only": True,
        **{
            name: _attacks(config, final_model(config, base_model, path), task, members, others)
            for name, path in federations.items()
        },
    }


def _records(silos: Mapping[str, SiloConfig], task: Task, limit: int) -> tuple[list[Encoded], list[Encoded]]:
    """The same number of training and of held-out records of each silo; which is which was decided by a keyed hash."""
    members: list[Encoded] = []
    others: list[Encoded] = []
    for silo in silos.values():
        units = units_of(silo)
        count = min(limit, len(units.train), len(units.held_out))
        inside, outside = (
            [one for unit in spread(part, count) for one in task.examples(unit)[:1]]
            for part in (units.train, units.held_out)
        )
        found = min(len(inside), len(outside))  # a unit may have no example
        members += inside[:found]
        others += outside[:found]
    return members, others


def spread(units: Sequence[Rows], count: int) -> list[Rows]:
    """Units from the whole length of the source: the first ones may share an author or a time, and be told by that."""
    return [units[index] for index in np.linspace(0, len(units) - 1, count).round().astype(int)]


def _attacks(
    config: RunConfig, model: Any, task: Task, members: Sequence[Encoded], others: Sequence[Encoded]
) -> dict[str, Any]:
    def losses(records: Sequence[Encoded]) -> npt.NDArray[np.float64]:
        return record_losses(model, task, records, config.federated.micro_batch_size)

    after = losses(members), losses(others)
    with model.disable_adapter():
        before = losses(members), losses(others)
    return {
        "loss": membership_figures(-after[0], -after[1]),
        "loss_against_base": membership_figures(before[0] - after[0], before[1] - after[1]),
    }
