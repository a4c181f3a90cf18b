"""The base model with an adapter, kept warm once per process, for the silos that it hosts and for whoever scores."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from configs.schema.federated import FederatedSettings
from configs.schema.schema import RunConfig
from configs.storage.sealing import load_key
from federated.adapters.arrays import Arrays
from federated.adapters.lora_factors import frozen
from trainer.augmentation import augmentation
from trainer.models.adapters import Adaptation, adapted, adapter_weights, load_adapter_weights, trainable
from trainer.models.load import Head, load_model
from trainer.pretraining.onednn import fastest_products, use_onednn
from trainer.tasks.task import task_of


@lru_cache(maxsize=1)
def warm_model(
    directory: Path,
    how: Adaptation,
    key_file: str = "",
    frozen_seed: int | None = None,
    *,
    onednn: bool = True,
) -> Any:
    """The base model, ready to train, one per process, shared by the silos that it hosts (one trains at a time).

    Args:
        directory: of the base model.
        how: what of it trains.
        key_file: of the base model's key.
        frozen_seed: the seed that A is drawn from where it doesn't train (FFA-LoRA); None where it does.
        onednn: whether linear layers may be oneDNN's, where that is faster; Opacus doesn't know them.

    Raises:
        AdaptationError: the model hasn't got what is to train.
    """
    model = adapted(load_model(directory, load_key(key_file), how.head), how, frozen_seed or 0)
    for name, value in trainable(model).items():
        value.requires_grad = frozen_seed is None or not frozen(name)
    if onednn and fastest_products().onednn:
        use_onednn(model)
    return model


def adaptation(settings: FederatedSettings, head: Head | None = None) -> Adaptation:
    """What a run's settings say of what trains; of LoRA with its whole rank. The head is the task's."""
    targets = () if settings.adapter_targets == "all-linear" else settings.adapter_targets
    return Adaptation(settings.lora_rank, settings.lora_alpha, settings.train, targets, settings.base_dtype, head)


def adaptation_for(config: RunConfig, base_model: Path) -> Adaptation:
    """The same with the head that the run's task puts on its base model."""
    return adaptation(config.federated, task_of(config.federated.task_spec, base_model).head)


def initial_adapter(config: RunConfig, base_model: Path) -> Arrays:
    """What travels before the first round: A at random from the run's seed, B zero; or parameters of the model itself.

    A head is as it is put on.

    Raises:
        AdaptationError: the model hasn't got what is to train.
        InputError: nor what ``federated.augmentation`` needs.
    """
    task = task_of(config.federated.task_spec, base_model)
    augmentation(task, config.federated.augmentation)  # said here, before a silo is asked for anything
    how = adaptation(config.federated, task.head)
    base = load_model(base_model, load_key(config.run.encryption_key_file), how.head)
    model = adapted(base, how, config.run.seed)
    return {name: weight.numpy() for name, weight in adapter_weights(model).items()}


def put_on(model: Any, adapter: Arrays) -> dict[str, torch.Tensor]:
    """Gives a model with an adapter the values of another one.

    Returns:
        The values, by name.

    Raises:
        ValueError: names or shapes are not those of the model's adapter.
    """
    weights = {name: torch.from_numpy(array) for name, array in adapter.items()}
    load_adapter_weights(model, weights)
    return weights
