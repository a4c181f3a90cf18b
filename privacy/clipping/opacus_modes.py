"""Opacus' own ways to per-record gradients, behind the same interface as book-keeping.

They are slower or take more memory on our models, and are the oracle that book-keeping is tested against. Ghost
clipping is not among them: it never forms a record's gradient, and so nobody could look at what is added.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from configs.errors import InputError
from privacy.clipping.gradients import ByParameter, Dense

if TYPE_CHECKING:
    from collections.abc import Callable


class Hooks:
    """Gradients instantiated record by record, by hooks (``GradSampleModule``)."""

    def __init__(self, model: Any) -> None:
        from opacus import GradSampleModule

        self._model = model
        self._hooked = GradSampleModule(model, loss_reduction="sum", strict=False)
        self._hooked.disable_hooks()

    def per_record(self, losses: Callable[[], torch.Tensor], _num_records: int) -> ByParameter:
        """One forward and backward; see ``BookKeeper.per_record``."""
        self._hooked.enable_hooks()
        losses().sum().backward()
        self._hooked.disable_hooks()
        return _taken(self._model)

    def close(self) -> None:
        """Takes the hooks off."""
        self._hooked.remove_hooks()
        _clean(self._model, "grad_sample", "_forward_counter")


class ExpandedWeights:
    """Gradients instantiated record by record, by torch's expanded weights (``grad_sample_mode="ew"``)."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def per_record(self, losses: Callable[[], torch.Tensor], num_records: int) -> ByParameter:
        """One forward and backward; see ``BookKeeper.per_record``."""
        from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

        def forward(*args: Any, **kwargs: Any) -> Any:
            del self._model.forward  # the expanded model calls the original
            expanded = call_for_per_sample_grads(self._model, batch_size=num_records, loss_reduction="sum")
            return expanded(*args, **kwargs)

        self._model.forward = forward
        try:
            total = losses().sum()
        finally:
            self._model.__dict__.pop("forward", None)
        total.backward()
        return _taken(self._model)

    def close(self) -> None:
        """Leaves nothing on the model."""
        _clean(self._model, "grad_sample")


def _taken(model: Any) -> ByParameter:
    """The gradients that a backward has left on the parameters."""
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        gradient = getattr(parameter, "grad_sample", None)
        if not isinstance(gradient, torch.Tensor):
            raise InputError(f"parameter {name}: its per-record gradient is not known to this clipping mode; freeze it")
        found[name] = Dense(gradient.float())
        parameter.grad_sample = parameter.grad = None
    return ByParameter(found)


def _clean(model: Any, *names: str) -> None:
    for parameter in model.parameters():
        for name in names:
            if hasattr(parameter, name):
                delattr(parameter, name)
