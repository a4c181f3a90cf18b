"""What a trained model can do without: single weights, which become zero, or neurons, which are cut out."""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from configs.errors import InputError
from trainer.optimisation.layers import is_linear, keep, rows_of


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
    widths = {rows_of(attrgetter(block.out)(one), out=True).shape[0] for one in found}
    if len(widths) != 1 or (getattr(model.config, block.width, None) or min(widths)) not in widths:
        raise InputError(f"--method neurons: blocks of a {type(model).__name__} differ in width; give --method prune")
    (width,) = widths
    left = max(1, round(width * (1 - share)))
    for one in found:
        _cut(one, block, left)
    setattr(model.config, block.width, left)


def _blocks(model: Any) -> tuple[_Block, list[Any]]:
    for block in _BLOCKS:
        if found := [one for one in model.modules() if all(is_linear(one, name) for name in (*block.into, block.out))]:
            return block, found
    raise InputError(f"--method neurons: not known for a {type(model).__name__}; give --method prune")


def _cut(module: Any, block: _Block, left: int) -> None:
    into = [attrgetter(name)(module) for name in block.into]
    out = attrgetter(block.out)(module)
    moved_N = rows_of(out, out=True).norm(dim=1)
    for layer in into:
        moved_N = moved_N * rows_of(layer).norm(dim=1)
    kept = moved_N.topk(left).indices.sort().values
    for layer in into:
        keep(layer, kept, out=False)
    keep(out, kept, out=True)
