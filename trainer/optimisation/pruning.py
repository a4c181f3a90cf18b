"""What a trained model can do without: single weights, which become zero, or neurons, which are cut out."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from configs.errors import InputError


@dataclass(frozen=True)
class _Block:
    """How a family calls its feed-forward blocks.

    Attributes:
        into: layers that lead to the neurons.
        out: the layer that leads on from them.
        width: the configuration's name for how many neurons there are.
    """

    into: tuple[str, ...]
    out: str
    width: str


_BLOCKS = (
    _Block(("gate_proj", "up_proj"), "down_proj", "intermediate_size"),  # Llama and its relatives
    _Block(("c_fc",), "c_proj", "n_inner"),  # GPT-2
    _Block(("intermediate.dense",), "output.dense", "intermediate_size"),  # BERT
)


def prune_weights(model: Any, share: float) -> None:
    """Sets the smallest weights of every linear layer to zero, by magnitude; embeddings and heads stay whole.

    Args:
        model: it is changed.
        share: of each layer's weights.

    Raises:
        InputError: the model has no linear layer.
    """
    words = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer}
    layers = [layer for layer in model.base_model.modules() if isinstance(layer, torch.nn.Linear | Conv1D)]
    if not (chosen := [layer for layer in layers if id(layer.weight) not in words]):
        raise InputError(f"--method prune: a {type(model).__name__} has no linear layer; give another model")
    for layer in chosen:
        prune.l1_unstructured(layer, "weight", amount=share)
        prune.remove(layer, "weight")


def prune_neurons(model: Any, share: float) -> None:
    """Cuts the neurons out of every feed-forward block that move least: by the norms of their weights, in and out.

    Args:
        model: it is changed, and its configuration says the new width.
        share: of each block's neurons; at least one stays.

    Raises:
        InputError: it is of a family whose neurons aren't known here, or its blocks aren't all of one width.
    """
    block, found = _blocks(model)
    widths = {_neurons_first(attrgetter(block.out)(one), out=True).shape[0] for one in found}
    if len(widths) != 1 or (getattr(model.config, block.width, None) or min(widths)) not in widths:
        raise InputError(f"--method neurons: blocks of a {type(model).__name__} differ in width; give --method prune")
    (width,) = widths
    left = max(1, round(width * (1 - share)))
    for one in found:
        _cut(one, block, left)
    setattr(model.config, block.width, left)


METHODS: dict[str, Callable[[Any, float], None]] = {"prune": prune_weights, "neurons": prune_neurons}


def _blocks(model: Any) -> tuple[_Block, list[Any]]:
    for block in _BLOCKS:
        if found := [one for one in model.modules() if all(_has(one, name) for name in (*block.into, block.out))]:
            return block, found
    raise InputError(f"--method neurons: not known for a {type(model).__name__}; give --method prune")


def _has(module: Any, name: str) -> bool:
    try:
        return isinstance(attrgetter(name)(module), torch.nn.Linear | Conv1D)
    except AttributeError:
        return False


def _neurons_first(layer: Any, *, out: bool) -> torch.Tensor:
    """A layer's weights with a row for each neuron: (outputs, inputs) in a linear layer, the reverse in GPT-2's."""
    weight: torch.Tensor = layer.weight.detach()
    return weight.T if out is isinstance(layer, torch.nn.Linear) else weight


def _cut(module: Any, block: _Block, left: int) -> None:
    into = [attrgetter(name)(module) for name in block.into]
    out = attrgetter(block.out)(module)
    moved_N = _neurons_first(out, out=True).norm(dim=1)
    for layer in into:
        moved_N = moved_N * _neurons_first(layer, out=False).norm(dim=1)
    kept = moved_N.topk(left).indices.sort().values
    for layer in into:
        _keep(layer, kept, out=False)
    _keep(out, kept, out=True)


def _keep(layer: Any, kept: torch.Tensor, *, out: bool) -> None:
    linear = isinstance(layer, torch.nn.Linear)
    side = int(out is linear)  # of the weights: where the neurons are
    layer.weight = torch.nn.Parameter(layer.weight.detach().index_select(side, kept))
    if not out and layer.bias is not None:
        layer.bias = torch.nn.Parameter(layer.bias.detach()[kept])
    inputs, outputs = ("in_features", "out_features") if linear else ("nx", "nf")
    setattr(layer, inputs if out else outputs, len(kept))


def sizes(model: Any) -> dict[str, float]:
    """Bytes of a model's weights, as they lie on disk, and the share of them that is zero."""
    values = list(model.parameters())
    count = sum(value.numel() for value in values)
    zeros = sum(int((value == 0).sum()) for value in values)
    return {"bytes": sum(value.nbytes for value in values), "zeros": zeros / count}
