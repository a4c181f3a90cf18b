"""A silo's personal adapter: trained after the shared one, on top of it, and for this silo alone.

Its training has no noise, so it is private data, and so is what it says. It lies in the silo's state directory, and
nothing that answers a coordinator reads it: it starts from what was released, and no released value starts from it.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.errors import InputError
from configs.schema.silo import SiloConfig
from configs.storage.layout import SiloFiles
from configs.storage.manifests import require_manifest
from configs.storage.sealing import MasterKey, load_key, sealing
from federated.adapters.merged import with_shared
from federated.silo.units import units_of
from trainer.device import beside, device_of
from trainer.models.adapters import add_adapter, trainable
from trainer.models.load import load_model
from trainer.scoring.score import score
from trainer.tasks.task import Encoded, Task, by_length, task_of

_OTHERS = 0o077


@dataclass(frozen=True)
class PersonalSettings:
    """How a personal adapter is trained.

    Attributes:
        steps: of AdamW.
        batch_size: training units per step.
        learning_rate: constant.
        rank: of the personal adapter.
        alpha: its scale.
        micro_batch_size: units processed at once; speed only.
    """

    steps: int
    batch_size: int
    learning_rate: float
    rank: int
    alpha: float
    micro_batch_size: int


@dataclass(frozen=True)
class PersonalResult:
    """Exact figures of private records, for the steward's eyes alone.

    Attributes:
        folder: where the adapter lies, as peft's ``PeftModel.from_pretrained`` loads it onto base plus shared adapter.
        figure: what is measured: bits per character of texts, accuracy of labels.
        shared: of the held-out units under the shared adapter alone; None where a loss is not finite.
        personal: with the personal adapter on top.
    """

    folder: Path
    figure: str
    shared: float | None
    personal: float | None


def personalise(config: SiloConfig, shared: Path, settings: PersonalSettings) -> PersonalResult:
    """Trains a silo's personal adapter; the silo's service may go on running meanwhile.

    Args:
        config: the silo.
        shared: folder of the shared adapter, or of the whole model, as a federation writes it.
        settings: how to train.

    Raises:
        InputError: the shared adapter can't be loaded, or the silo has no training or no held-out unit.
    """
    base_model, files = Path(config.silo.base_model), SiloFiles(Path(config.silo.state_dir))
    key = load_key(config.silo.encryption_key_file)
    require_manifest(base_model, "model", "export")
    task = task_of(config.task_spec, base_model)
    units = units_of(config)
    train = [example for unit in units.train for example in task.examples(unit)]
    held_out = [example for unit in units.held_out for example in task.scored(unit)]
    if not train or not held_out:
        raise InputError(f"silo {config.silo.id!r}: {len(train)} training and {len(held_out)} held-out units; add some")
    # A model of its own: the service's warm one must never have seen this.
    device = device_of(config.silo.device, config.silo.gpu_memory_share)
    model = with_shared(load_model(base_model, key, task.head), shared).to(device)
    with beside(model):
        before = score(model, task, held_out, settings.micro_batch_size).main
    model = add_adapter(model, settings.rank, settings.alpha, seed=0, head=task.head)
    _train(model, task, train, settings)
    with beside(model):
        after = score(model.eval(), task, held_out, settings.micro_batch_size).main
    folder = _save(model, files.personal, key, config.silo.id)
    return PersonalResult(folder, task.measures.main, before, after)


def _train(model: Any, task: Task, units: Sequence[Encoded], settings: PersonalSettings) -> None:
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=settings.learning_rate)
    chance = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(settings.steps):
        chosen = torch.randperm(len(units), generator=chance)[: settings.batch_size]
        batch = [units[index] for index in chosen.tolist()]
        for micro in by_length(batch, settings.micro_batch_size):
            with beside(model):
                loss = task.record_losses(model, task.collate(micro)).sum() / len(batch)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _save(model: Any, folder: Path, key: MasterKey | None, silo: str) -> Path:
    before = os.umask(_OTHERS)  # its owner's alone from its first moment on
    try:
        with sealing(folder, key, f"{folder.name}/{silo}") as place:
            model.save_pretrained(place, save_embedding_layers=False)
    finally:
        os.umask(before)
    folder.chmod(0o700)
    return folder
