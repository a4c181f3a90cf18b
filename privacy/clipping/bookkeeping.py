"""Book-keeping: per-record gradients from one forward and one backward pass (Bu et al. 2023).

Every layer with trainable parameters notes its input on the way forward and its output's gradient on the way back;
their product is what the parameter's gradient would be, record by record. The parameters themselves take no part in
autograd, so that the summed gradient, which nobody needs, is never computed.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from configs.errors import InputError
from privacy.clipping.gradients import ByParameter, Dense, combine
from privacy.clipping.layers import (
    expanded_ids,
    is_activation,
    is_product,
    of_positions,
    relative_bias_pieces,
    rule_for,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from privacy.clipping.gradients import PerRecord
    from privacy.clipping.layers import Rule


class BookKeeper:
    """Per-record gradients of a model's trainable parameters.

    Args:
        model: its trainable parameters belong to layers that ``privacy.clipping.layers`` knows.

    Raises:
        InputError: one belongs to another kind of layer.
    """

    def __init__(self, model: Any) -> None:
        self._parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        names = {id(value): name for name, value in self._parameters.items()}
        self._biased = [(module, names[bias]) for module, bias in _relative_biases(model) if bias in names]
        self._frozen_biased = [module for module, bias in _relative_biases(model) if bias not in names]
        inside = {id(module.relative_attention_bias) for module, _ in self._biased}
        modules = list(model.modules())
        self._products = [module for module in modules if is_product(module)]
        self._activations = [module for module in modules if is_activation(module)]
        self._layers: list[tuple[Any, Rule, dict[str, str]]] = []
        unknown: dict[str, str] = {}
        for path, module in model.named_modules():
            own = {own: names[id(value)] for own, value in module.named_parameters(recurse=False) if id(value) in names}
            rule = rule_for(path, module) if own else None
            if own and rule is None:
                unknown |= dict.fromkeys(own.values(), f"{path or 'model'} ({type(module).__name__})")
            elif rule is not None and id(module) not in inside:
                self._layers.append((module, rule, own))
        # A parameter may have a second owner that only holds it (BERT's head holds its decoder's bias).
        known = {name for _, _, own in self._layers for name in own.values()} | {name for _, name in self._biased}
        for name in unknown.keys() - known:
            raise InputError(
                f"layer {unknown[name]}: the per-record gradient of its parameter {name} is not known; freeze it, or "
                "set clipping to an Opacus mode that knows this layer"
            )

    def per_record(self, losses: Callable[[], torch.Tensor], num_records: int) -> ByParameter:
        """Runs one forward and one backward pass.

        Args:
            losses: runs the forward pass and gives each record's loss, shape (B,).
            num_records: B.

        Returns:
            The gradients of every parameter that the losses depend on, by name.

        Raises:
            InputError: a layer doesn't have the records in its first dimension.
        """
        book = _Book(num_records)
        with self._listening(book):
            total = losses().sum()
            if book.called and not book.outputs:
                raise InputError(
                    "clipping: gradients are asked of the model's inputs; switch enable_input_require_grads off"
                )
            # Backward goes only as far as the layers' outputs: no parameter accumulates anything.
            torch.autograd.grad(total, book.outputs, allow_unused=True)
        return ByParameter({name: combine(found, self._parameters[name]) for name, found in book.close().items()})

    def close(self) -> None:
        """Has nothing to do: nothing stays on the model between passes."""

    @contextmanager
    def _listening(self, book: _Book) -> Iterator[None]:
        """Sets the hooks and takes the parameters out of autograd, and puts all back afterwards."""
        with ExitStack() as stack:
            for parameter in self._parameters.values():
                parameter.requires_grad_(False)
                stack.callback(parameter.requires_grad_, True)
            for module in (*self._products, *self._activations):
                asked = _one_by_one if module in self._activations else _vectors_one_by_one
                module.forward = partial(asked, book.num_records, module.forward)
                stack.callback(delattr, module, "forward")
            for module, rule, names in self._layers:
                before = partial(expanded_ids, book.num_records)
                if isinstance(module, torch.nn.Embedding):
                    stack.callback(module.register_forward_pre_hook(before).remove)
                hook = module.register_forward_hook(partial(book.forward, rule, names), with_kwargs=True)
                stack.callback(hook.remove)
            for module, name in self._biased:
                module.compute_bias = partial(book.relative_bias, module, name, module.compute_bias)
                stack.callback(delattr, module, "compute_bias")
            for module in self._frozen_biased:
                module.compute_bias = partial(_bias_of_positions, module.compute_bias)
                stack.callback(delattr, module, "compute_bias")
            yield


def _one_by_one(num_records: int, forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """A layer's output, asked for record by record.

    torch shares an elementwise operation's numbers among its threads, and what is left of a share by whole vectors is
    computed by other code, which rounds an exponential differently. Whose numbers these are would depend on how many
    records there are.
    """
    if num_records == 1 or len(x) != num_records:
        return forward(x)
    return torch.cat([forward(row) for row in x.split(1)])


def _vectors_one_by_one(
    num_records: int, forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """The output of a product; one that sees a single vector per record is asked record by record.

    Kernels for products of few rows are chosen by their number, and so a row's last bits would depend on it.
    """
    return _one_by_one(num_records, forward, x) if x.dim() == 2 else forward(x)


def _relative_biases(model: Any) -> Iterator[tuple[Any, int]]:
    """T5: attention layers with one bias for all records, made from an embedding without a records' dimension.

    Each with the identity of its weight.
    """
    for module in model.modules():
        bias = getattr(module, "relative_attention_bias", None)
        if bias is not None and hasattr(module, "compute_bias"):
            yield module, id(bias.weight)


def _bias_of_positions(compute: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """A bias; where no tensor goes in, no record does."""
    if any(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values())):
        return compute(*args, **kwargs)
    with of_positions():
        return compute(*args, **kwargs)


class _Book:
    """What one pass has noted."""

    def __init__(self, num_records: int) -> None:
        self.num_records = num_records
        self.pieces: dict[str, list[PerRecord]] = defaultdict(list)
        self.outputs: list[torch.Tensor] = []
        self.called = False

    def close(self) -> dict[str, list[PerRecord]]:
        """Hands over what was noted. The outputs' hooks hold this book: without its outputs, all is freed at once."""
        self.outputs.clear()
        return self.pieces

    def forward(
        self, rule: Rule, names: dict[str, str], module: Any, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> None:
        """A layer was called: its input is noted, and its output's gradient will be."""
        if not torch.is_grad_enabled():
            return
        entry = args[0] if args else next(iter(kwargs.values()))
        for value in (entry, output):
            if value.shape[0] != self.num_records:
                raise InputError(
                    f"parameters {', '.join(names.values())}: their layer saw a first dimension of {value.shape[0]} "
                    f"for {self.num_records} records, so no record's own gradient is known; freeze them"
                )
        self._expect_gradient(output, partial(self._backward, rule, names, module, entry.detach()))

    def _backward(
        self, rule: Rule, names: dict[str, str], module: Any, entry: torch.Tensor, gradient: torch.Tensor
    ) -> None:
        for own, piece in rule(module, entry, gradient, names.keys()):
            before = self.pieces[names[own]]
            if before and isinstance(piece, Dense) and isinstance(before[-1], Dense):
                # A recurrent layer is called for every token: to keep each call's would take a model for each of them.
                before[-1] = Dense(before[-1].gradient + piece.gradient)
            else:
                before.append(piece)

    def relative_bias(self, module: Any, name: str, original: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """T5's bias, repeated for each record so that each has a gradient of its own."""
        ids: list[torch.Tensor] = []
        embedding = module.relative_attention_bias
        hook = embedding.register_forward_hook(lambda _, given, __: ids.append(given[0]))
        bias_1HQK = _bias_of_positions(original, *args, **kwargs)
        hook.remove()
        bias_BHQK = bias_1HQK.expand(self.num_records, -1, -1, -1).clone()

        def backward(gradient: torch.Tensor) -> None:
            self.pieces[name].append(relative_bias_pieces(embedding, ids[0], gradient))

        self._expect_gradient(bias_BHQK, backward)
        return bias_BHQK

    def _expect_gradient(self, output: torch.Tensor, backward: Callable[[torch.Tensor], None]) -> None:
        self.called = True
        if not output.requires_grad:
            # The first trainable layer on this path: from here on there is a graph.
            self.outputs.append(output.requires_grad_())
        output.register_hook(backward)
