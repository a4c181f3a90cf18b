"""Opacus' own ways to per-record gradients, behind the same interface as book-keeping.

Slower or hungrier on our models, and the oracle that book-keeping is tested against.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from configs.errors import InputError
from privacy.gradients import ByParameter, Instantiated

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


class Ghost:
    """Norms without gradients, then a second backward of the weighted losses (Li et al. 2022)."""

    def __init__(self, model: Any) -> None:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

        self._model = model
        self._hooked = GradSampleModuleFastGradientClipping(model, loss_reduction="sum", strict=False)
        self._hooked.disable_hooks()

    def per_record(self, losses: Callable[[], torch.Tensor], _num_records: int) -> _Weighted:
        """One forward and backward; the second backward comes with the factors."""
        for parameter in self._model.parameters():
            parameter._norm_sample = None
        self._hooked.enable_hooks()
        losses_B = losses()
        losses_B.sum().backward(retain_graph=True)
        self._hooked.disable_hooks()
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad and parameter._norm_sample is None:
                raise InputError(f"parameter {name}: unused by these records, which this clipping mode can't take")
        norms_B = self._hooked.get_norm_sample()
        for parameter in self._model.parameters():
            parameter.grad = None
        return _Weighted(self._model, losses_B, norms_B)

    def close(self) -> None:
        """Takes the hooks off."""
        self._hooked.remove_hooks()
        _clean(self._model, "grad_sample", "_norm_sample", "_forward_counter")


class _Weighted:
    def __init__(self, model: Any, losses_B: torch.Tensor, norms_B: torch.Tensor) -> None:
        self._losses_B, self._norms_B = losses_B, norms_B
        self._parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}

    def squared_norms(self) -> torch.Tensor:
        return self._norms_B.float().square()

    def add_to(self, sums: dict[str, torch.Tensor], factors_B: torch.Tensor) -> None:
        weighted = (self._losses_B * factors_B).sum()
        gradients = torch.autograd.grad(weighted, list(self._parameters.values()), retain_graph=True, allow_unused=True)
        for name, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is not None:
                sums[name] += gradient


def _taken(model: Any) -> ByParameter:
    """The gradients that a backward has left on the parameters."""
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        gradient = getattr(parameter, "grad_sample", None)
        if not isinstance(gradient, torch.Tensor):
            raise InputError(f"parameter {name}: its per-record gradient is not known to this clipping mode; freeze it")
        found[name] = Instantiated(gradient.float())
        parameter.grad_sample = parameter.grad = None
    return ByParameter(found)


def _clean(model: Any, *names: str) -> None:
    for parameter in model.parameters():
        for name in names:
            if hasattr(parameter, name):
                delattr(parameter, name)
