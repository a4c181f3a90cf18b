"""Frozen weights in bfloat16: half the memory, and products on the units that processors have for it.

Only weights of linear layers and embeddings are rounded, and what a linear layer multiplies them with. Whatever lies
between such layers is float32, as are norms, biases and what trains.
"""

from typing import Any

import torch
from torch import nn


def round_frozen(model: Any) -> None:
    """Rounds the frozen weights of a model's linear layers and embeddings to bfloat16, in place."""
    from transformers.pytorch_utils import Conv1D

    rounded = {nn.Linear: _Linear, nn.Embedding: _Embedding, Conv1D: _conv1d()}
    for module in model.modules():
        kind = rounded.get(type(module))
        if kind is not None and not module.weight.requires_grad:
            module.weight.data = module.weight.data.to(torch.bfloat16)  # of a tied weight once, for both its layers
            module.__class__ = kind


class _Linear(nn.Linear):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Gives x W^T + b."""
        return _product(inputs, self.weight.t(), self.bias)


class _Embedding(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Gives the rows of the ids."""
        return super().forward(ids).float()


def _conv1d() -> type[nn.Module]:
    """A linear layer with its weight the other way round, as GPT-2 has; transformers is imported where it is needed."""
    from transformers.pytorch_utils import Conv1D

    class Rounded(Conv1D):  # type: ignore[misc]
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            """Gives x W + b."""
            return _product(inputs, self.weight, self.bias)

    return Rounded


def _product(inputs: torch.Tensor, weight_IO: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product in bfloat16 and the sum in float32, record by record.

    Kernels for long sums are chosen by the number of rows, and so a record's last bits would depend on how many others
    there are. Then private training would have to take every record through the whole model by itself.
    """
    records = inputs.to(torch.bfloat16).split(1)
    product = torch.cat([torch.matmul(record, weight_IO) for record in records]).float()
    return product if bias is None else product + bias
