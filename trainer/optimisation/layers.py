"""Linear layers of any family, whose weights lie one way in most of them and the other way in GPT-2's."""

from operator import attrgetter
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D


def is_linear(module: Any, name: str) -> bool:
    """Whether a module has a linear layer by that name."""
    try:
        return isinstance(attrgetter(name)(module), torch.nn.Linear | Conv1D)
    except AttributeError:
        return False


def rows_of(layer: Any, *, out: bool = False) -> torch.Tensor:
    """A layer's weights, seen with a row for each of its outputs, or of its inputs where these are what is looked at.

    Args:
        layer: (outputs, inputs) in a linear layer, the reverse in GPT-2's.
        out: whether the layer leads on from what is looked at.
    """
    weight: torch.Tensor = layer.weight.detach()
    return weight.T if out is isinstance(layer, torch.nn.Linear) else weight


def keep(layer: Any, kept: torch.Tensor, *, out: bool) -> None:
    """Cuts all but some of a layer's outputs out, or of its inputs.

    Args:
        layer: it is changed.
        kept: numbers of those that stay.
        out: whether the layer leads on from what is cut.
    """
    linear = isinstance(layer, torch.nn.Linear)
    side = int(out is linear)  # of the weights: where they are
    layer.weight = torch.nn.Parameter(layer.weight.detach().index_select(side, kept))
    if not out and layer.bias is not None:
        layer.bias = torch.nn.Parameter(layer.bias.detach()[kept])
    inputs, outputs = ("in_features", "out_features") if linear else ("nx", "nf")
    setattr(layer, inputs if out else outputs, len(kept))


def fits_its_configuration(model: Any) -> bool:
    """Whether whoever loads a model by its configuration finds the shapes that its weights have."""
    with torch.device("meta"):
        outline = type(model)._from_config(model.config)
    expected = {name: value.shape for name, value in outline.named_parameters()}
    return {name: value.shape for name, value in model.named_parameters()} == expected
