"""Per-record gradients of the layers that book-keeping knows, from a layer's input and its output's gradient.

Shape suffixes: B records, T positions, M outputs, N inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from configs.errors import InputError
from privacy.clipping.gradients import Dense, PerRecord, Rows, product, rows

_CONV1D, _ONEDNN = "Conv1D", "OneDnnLinear"  # classes of transformers and of trainer.pretraining.onednn
# (layer, input, output gradient, own parameters that train) -> (own parameter, what this call adds to its gradients)
Rule = Callable[[Any, torch.Tensor, torch.Tensor, Collection[str]], Iterator[tuple[str, PerRecord]]]


def rule_for(path: str, module: Any) -> Rule | None:
    """The rule for a layer, None where none is known.

    Raises:
        InputError: an embedding whose gradients are not per record.
    """
    kind = type(module)
    if isinstance(module, nn.Embedding) and kind.forward is nn.Embedding.forward:
        _check_embedding(path, module)
        return _embedding
    if is_product(module):
        return _conv1d if kind.__name__ == _CONV1D else _linear
    if kind is nn.LayerNorm:
        return _layer_norm
    if kind.__name__.endswith("RMSNorm") or kind.__name__ == "T5LayerNorm":
        return _rms_norm
    return None


def is_product(module: Any) -> bool:
    """Whether a layer is a product with its weight: a linear layer, or its transpose, transformers' Conv1D (GPT-2)."""
    kind = type(module)
    if kind.__name__ == _CONV1D:
        return hasattr(module, "nf")
    return isinstance(module, nn.Linear) and (kind.forward is nn.Linear.forward or kind.__name__ == _ONEDNN)


def is_activation(module: Any) -> bool:
    """Whether a module computes one number from one, as torch's and transformers' activations do."""
    known = type(module).__module__ in ("torch.nn.modules.activation", "transformers.activations")
    return known and not isinstance(module, nn.MultiheadAttention)


def _check_embedding(path: str, module: nn.Embedding) -> None:
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        raise InputError(
            f"layer {path or 'model'}: an embedding with max_norm, scale_grad_by_freq or sparse gradients mixes "
            "records or hides gradients; build it without them, or freeze it"
        )


def _linear(module: Any, entry: torch.Tensor, gradient: torch.Tensor, wanted: Collection[str]) -> Iterator[Any]:
    gradient_BTM = _positions(gradient)
    if "weight" in wanted:
        yield "weight", product(gradient_BTM, _positions(entry), getattr(module, "multiply", None))
    if "bias" in wanted:
        yield "bias", Dense(gradient_BTM.sum(dim=1, dtype=torch.float32))


def _conv1d(_module: Any, entry: torch.Tensor, gradient: torch.Tensor, wanted: Collection[str]) -> Iterator[Any]:
    gradient_BTM = _positions(gradient)
    if "weight" in wanted:
        yield "weight", product(_positions(entry), gradient_BTM, None)
    if "bias" in wanted:
        yield "bias", Dense(gradient_BTM.sum(dim=1, dtype=torch.float32))


def _embedding(module: Any, ids: torch.Tensor, gradient: torch.Tensor, _wanted: Collection[str]) -> Iterator[Any]:
    yield "weight", _rows(module, ids.flatten(1), gradient.reshape(len(ids), -1, gradient.shape[-1]))


def _rows(module: Any, ids_BT: torch.Tensor, gradient_BTN: torch.Tensor) -> Rows:
    if module.padding_idx is not None:  # torch gives the padding row no gradient
        gradient_BTN = gradient_BTN.masked_fill((ids_BT == module.padding_idx)[..., None], 0.0)
    return rows(ids_BT, gradient_BTN)


_of_positions = ContextVar("of_positions", default=False)


@contextmanager
def of_positions() -> Iterator[None]:
    """Inside the context positions alone are computed with: no record's numbers, nor how many records there are."""
    before = _of_positions.set(True)
    try:
        yield
    finally:
        _of_positions.reset(before)


def is_of_positions() -> bool:
    """Whether what is computed now is the same for any records."""
    return _of_positions.get()


def relative_bias_pieces(module: Any, ids_QK: torch.Tensor, gradient_BHQK: torch.Tensor) -> Rows:
    """T5's relative position bias: an embedding of bucket numbers that are the same for every record."""
    gradient_BTH = gradient_BHQK.flatten(2).transpose(1, 2)
    return _rows(module, ids_QK.flatten().expand(len(gradient_BHQK), -1), gradient_BTH)


def _layer_norm(module: Any, entry: torch.Tensor, gradient: torch.Tensor, wanted: Collection[str]) -> Iterator[Any]:
    if "weight" in wanted:
        normalized = functional.layer_norm(entry.float(), module.normalized_shape, eps=module.eps)
        yield "weight", _over_positions(gradient.float() * normalized, module.weight.dim())
    if "bias" in wanted:
        yield "bias", _over_positions(gradient.float(), module.bias.dim())


def _rms_norm(module: Any, entry: torch.Tensor, gradient: torch.Tensor, _wanted: Collection[str]) -> Iterator[Any]:
    values = entry.float()
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    eps = torch.finfo(entry.dtype).eps if eps is None else eps
    normalized = functional.rms_norm(values, module.weight.shape, eps=eps)
    yield "weight", _over_positions(gradient.float() * normalized, module.weight.dim())


def _over_positions(values: torch.Tensor, kept: int) -> Dense:
    between = tuple(range(1, values.dim() - kept))
    return Dense(values.sum(dim=between) if between else values)


def _positions(values: torch.Tensor) -> torch.Tensor:
    """(B, ..., N) as (B, T, N)."""
    if values.dim() == 3:
        return values
    return values[:, None] if values.dim() == 2 else values.flatten(1, -2)


def expanded_ids(num_records: int, _module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Position ids that are given once for all records (GPT-2, BERT) are repeated: each record has its own gradient."""
    if not args:
        raise InputError("clipping: an embedding is called with its ids by name; call it with them as first argument")
    ids = args[0]
    return (ids.expand(num_records, *ids.shape[1:]), *args[1:]) if len(ids) == 1 and num_records > 1 else args
