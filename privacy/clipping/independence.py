"""Which units may be computed together: those of one shape, where it is proved that none changes another one's bits.

A library may choose another kernel for another number of rows, and a row's last bits then depend on its neighbours. An
adapter that was made to exploit this turns last bits into another gradient. So units are computed together only if all
that decides which instructions run is the same for them (their shape, and how many they are), and if on this machine
made-up units give the same bits together as each alone; everything else is computed one unit at a time.

The order of a kernel's instructions depends on shapes, never on values, which is what lets made-up units speak for
private ones. But a difference may show in few numbers alone: an elementwise operation is cut into shares for threads,
and the last numbers of a share are computed by other code than the rest, which rounds an exponential differently once
in a while. So the proof also looks at which operations the pass is made of. Only those are let through that work row by
row or round each number correctly, whatever code computes it; others must see one unit at a time, as activations do
here.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from configs.errors import InputError
from privacy.clipping.clipping import MOST_AT_ONCE, Clipper, Losses
from privacy.clipping.layers import is_of_positions

Unit = TypeVar("Unit")
_SIZES = (MOST_AT_ONCE, 8, 4, 2)  # powers of two: few different shapes to prove
_SCALES = (0.5, 8.0)  # of a layer's outputs under the made-up weights
_LARGEST_NUMBERS = 2**27  # of per-record gradients held at once; 4 bytes each

# These work row by row (products, softmax, norms, sums of a row), move numbers, or are one correctly rounded operation.
_NAMES = """
_local_scalar_dense _log_softmax _log_softmax_backward_data _softmax _softmax_backward_data _to_copy _unique2
_unsafe_view abs add add_ addmm alias all any arange argmax bincount bitwise_and bitwise_or bmm cat clone copy_ cumsum
detach div embedding empty eq expand fill_ flip floor_divide full full_like gather ge gt index index_add_ index_put
index_put_ le lift_fresh linalg_vector_norm lt masked_fill masked_fill_ max mean minimum mm mul native_layer_norm
native_layer_norm_backward ne neg new_zeros nll_loss2d_backward nll_loss2d_forward nll_loss_backward nll_loss_forward
ones_like permute relu remainder rsqrt scalar_tensor select select_backward slice slice_backward split split_with_sizes
sqrt squeeze stack sub sum t threshold_backward transpose unbind unsqueeze view where zeros zeros_like
"""
_BY_ROW = {*(f"aten.{name}" for name in _NAMES.split()), "mkldnn._linear_pointwise"}
# Proofs by model, kept for as long as it lives: a silo proves once what all its charges need.
_PROVED: MutableMapping[Any, dict[Hashable, bool]] = WeakKeyDictionary()


class Together(Generic[Unit]):
    """Cuts batches into units that may be computed together.

    Args:
        clipper: of the model.
        unit_losses: losses of units of one shape, shape (B,).
        shape_of: everything about a unit that decides the shape of its computation.
        made_up: gives so many made-up units of a shape, all different.
        micro_batch_size: most units at once; changes no bit of the result.
    """

    def __init__(
        self,
        clipper: Clipper,
        unit_losses: Losses[Unit],
        shape_of: Callable[[Unit], Hashable],
        made_up: Callable[[Any, int], Sequence[Unit]],
        micro_batch_size: int,
    ) -> None:
        self._clipper, self._unit_losses, self._shape_of, self._made_up = clipper, unit_losses, shape_of, made_up
        numbers = sum(value.numel() for value in clipper.parameters.values())
        self._largest = min(micro_batch_size, max(1, _LARGEST_NUMBERS // numbers))
        self._proved = _PROVED.setdefault(clipper.model, {})

    def cut(self, batch: Sequence[Unit]) -> Iterator[list[Unit]]:
        """The units of a batch in parts, each of one shape and of a size that is proved for it."""
        alike: dict[Hashable, list[Unit]] = defaultdict(list)
        for unit in batch:
            alike[self._shape_of(unit)].append(unit)
        for shape, units in alike.items():
            start = 0
            while start < len(units):
                size = self._size(shape, len(units) - start)
                yield units[start : start + size]
                start += size

    def proved(self, shape: Hashable) -> int:
        """Most units of a shape that are computed together.

        Raises:
            InputError: this device gives other bits when it is asked again.
        """
        size = self._size(shape, self._largest)
        units = self._made_up(shape, size)
        if not _equal(self._gradients(units), self._gradients(units)):
            raise InputError(
                "clipping: this device gives other bits when it is asked for the same again, so that nothing can be "
                'proved of single records; set silo.device to "cpu"'
            )
        return size

    def sizes(self, shape: Hashable) -> Iterator[int]:
        """How many units of a shape are computed together, ascending; each is proven when it is asked for."""
        yield from (s for s in reversed((*_SIZES, 1)) if s <= self._largest and (s == 1 or self._holds(shape, s)))

    def _size(self, shape: Hashable, there: int) -> int:
        return next((s for s in _SIZES if s <= min(there, self._largest) and self._holds(shape, s)), 1)

    def _holds(self, shape: Hashable, size: int) -> bool:
        key = (shape, size, type(self._clipper.source), tuple(self._clipper.parameters), torch.get_num_threads())
        if key not in self._proved:
            self._proved[key] = all(self._same_bits(shape, size, scale) for scale in _SCALES)
        return self._proved[key]

    def _same_bits(self, shape: Hashable, size: int, scale: float) -> bool:
        """Whether made-up units have the same bits together as alone. Gradients of zero alone prove nothing."""
        units = self._made_up(shape, size)
        if any(self._shape_of(unit) != shape for unit in units):
            return False
        with made_up_weights(self._clipper.parameters, scale):
            with _Operations() as operations:
                together = self._gradients(units)
            alone = [self._gradients([unit])[0] for unit in units]
        shown = any(value.any() for value in alone[0].values())
        return shown and operations.by_record and _equal(together, alone)

    def _gradients(self, units: Sequence[Unit]) -> list[dict[str, torch.Tensor]]:
        """Each unit's gradient by parameter and, under the empty name, which no parameter has, its squared norm."""
        found = self._clipper.source.per_record(lambda: self._unit_losses(units), len(units))
        squares_B = found.squared_norms()
        return [{**found.of(record, self._clipper.parameters), "": squares_B[record]} for record in range(len(units))]


def _equal(some: list[dict[str, torch.Tensor]], others: list[dict[str, torch.Tensor]]) -> bool:
    return all(
        torch.equal(mine[name], value)
        for mine, theirs in zip(some, others, strict=True)
        for name, value in theirs.items()
    )


class _Operations(TorchDispatchMode):
    """Looks at all operations of a pass: whether none can make a record's numbers depend on how many there are."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_record = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        one = all(tensor.dim() == 0 or len(tensor) == 1 for tensor in tensors)  # a record's own, or public
        exact = str(func.overloadpacket) in _BY_ROW or (str(func.overloadpacket) == "aten.pow" and args[1] in (1, 2, 3))
        self.by_record &= exact or one or is_of_positions()
        return func(*args, **kwargs or {})


@contextmanager
def made_up_weights(parameters: dict[str, torch.nn.Parameter], scale: float) -> Iterator[None]:
    """Random weights in place of those that a request brought, which may be made to hide something."""
    before = {name: value.detach().clone() for name, value in parameters.items()}
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for value in parameters.values():
                inputs = value.shape[1] if value.dim() > 1 else 1
                value.copy_(scale * inputs**-0.5 * torch.randn(value.shape, generator=generator, device="cpu"))
        yield
    finally:
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(before[name])
