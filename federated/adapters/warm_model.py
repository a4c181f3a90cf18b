"""The base model with an adapter, kept warm once per process, for the silos that it hosts and for whoever scores."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from configs.errors import InputError
from configs.schema.federated import FederatedSettings
from configs.schema.schema import RunConfig
from configs.schema.stages import frozen_below, stage_at
from configs.storage.sealing import load_key
from federated.adapters.arrays import Arrays
from federated.adapters.lora_factors import frozen
from trainer.augmentation import augmentation
from trainer.device import CPU, where
from trainer.models.adapters import Adaptation, adapted, adapter_weights, depths, load_adapter_weights, trainable
from trainer.models.load import Head, load_model
from trainer.pretraining.onednn import mkl_holds_back, use_onednn
from trainer.tasks.task import task_of


def warm_model(
    directory: Path,
    how: Adaptation,
    key_file: str = "",
    frozen_seed: int | None = None,
    *,
    onednn: bool = True,
    device: torch.device = CPU,
) -> Any:
    """The base model, ready to train, one per process, shared by the silos that it hosts (one trains at a time).

    Args:
        directory: of the base model.
        how: what of it trains.
        key_file: of the base model's key.
        frozen_seed: the seed that A is drawn from where it doesn't train (FFA-LoRA); None where it does.
        onednn: whether linear layers may be oneDNN's, where MKL holds back; Opacus doesn't know them.
        device: that it computes on.

    Raises:
        AdaptationError: the model hasn't got what is to train.
    """
    model, travelling = kept_warm(directory, how, key_file, frozen_seed, onednn, device)
    for value in travelling:  # the round before may have held some back
        value.requires_grad_(True)
    return model


@lru_cache(maxsize=1)
def kept_warm(
    directory: Path, how: Adaptation, key_file: str, frozen_seed: int | None, onednn: bool, device: torch.device
) -> tuple[Any, list[torch.nn.Parameter]]:
    """The model, made once, and what of it travels."""
    model = adapted(load_model(directory, load_key(key_file), how.head), how, frozen_seed or 0)
    for name, value in trainable(model).items():
        value.requires_grad = frozen_seed is None or not frozen(name)
    if device != CPU:
        model.to(device)
    elif onednn and mkl_holds_back():
        use_onednn(model)
    return model, list(trainable(model).values())


def hold_back(model: Any, below: int) -> dict[str, torch.nn.Parameter]:
    """Leaves out of what trains whatever lies below a depth, and gives it by name."""
    depth_of = depths(model) if below else {}
    held = {name: value for name, value in trainable(model).items() if depth_of.get(name, 0) < below}
    for value in held.values():
        value.requires_grad_(False)
    return held


def put_beside(held: Mapping[str, torch.nn.Parameter], values: Arrays) -> None:
    """Gives what was held back its values, which have its names and shapes."""
    with torch.no_grad():
        for name, parameter in held.items():
            parameter.copy_(torch.from_numpy(values[name]))


def held_back_in(config: RunConfig, base_model: Path) -> Callable[[int], frozenset[str]]:
    """Gives the names of what travels and does not train in a round, which is counted from 1.

    Raises:
        InputError: a stage freezes more layers than there are, nothing of what trains, or all of it.
    """
    stages = config.federated.stages
    if not any(stage.frozen for stage in stages):
        return lambda _: frozenset()
    how = adaptation_for(config, base_model)
    model = adapted(load_model(base_model, load_key(config.run.encryption_key_file), how.head), how, 0)
    depth_of, found = depths(model), list[frozenset[str]]()
    travelling = {name for name in trainable(model) if config.federated.adapters != "ffa" or not frozen(name)}
    for number, stage in enumerate(stages):
        below, said = frozen_below(stage.frozen), f"federated.stages.{number}.frozen is {stage.frozen!r}"
        held = {name for name in travelling if depth_of[name] < below}
        if below > max(depth_of.values()):
            raise InputError(f"{said}: the base model has {max(depth_of.values()) - 1} layers; give at most that")
        if below and (not held or held == travelling):
            raise InputError(f"{said}: {'all' if held else 'nothing'} of what trains lies there; give another number")
        found.append(frozenset(held))
    return lambda round_number: found[stage_at([stage.rounds for stage in stages], round_number - 1)[0]]


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
        The values, by name, where the model is.

    Raises:
        ValueError: names or shapes are not those of the model's adapter.
    """
    weights = {name: torch.from_numpy(array).to(where(model)) for name, array in adapter.items()}
    load_adapter_weights(model, weights)
    return weights
