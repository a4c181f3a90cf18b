"""Per-record gradients of one parameter, as float32 numbers, and what of them is added to a sum of many records.

A layer's weight gradient for record b is a product ``left[b]^T right[b]`` over its positions. For a linear layer the
factors are output gradients and inputs, for an embedding one-hot rows and output gradients. The product is formed for
each record by itself (book-keeping, Bu et al. 2023), so that what is measured and what is added are the same numbers.

Shape suffixes: B records, T positions, M rows and N columns of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Whole:
    """Whole numbers that stand for clipped gradients in units of the sum's grid.

    Attributes:
        squares: squared length of each record's numbers, (B,) float64, exact below 2^51.
        total: sum over the records, int32, of the parameter's shape, or its ``rows`` alone; each below 2^31.
        rows: numbers of the rows that ``total`` holds, each any number of times; None: all of them, in order.
    """

    squares: torch.Tensor
    total: torch.Tensor
    rows: torch.Tensor | None = None

    def add_to(self, sum_MN: torch.Tensor) -> None:
        """Adds them to a float64 sum of the parameter's shape."""
        if self.rows is None:
            sum_MN += self.total
        else:
            sum_MN.index_add_(0, self.rows, self.total.double())


@dataclass
class Dense:
    """A parameter's per-record gradients, (B, ...) float32."""

    gradient: torch.Tensor

    def squared_norms(self) -> torch.Tensor:
        """Squared norms, (B,) float64, which holds the square of every float32 number."""
        return _squares(self.gradient.flatten(1))

    def without(self, bad_B: torch.Tensor) -> Dense:
        """The same with zeros for some records."""
        return Dense(self.gradient.masked_fill(_like(bad_B, self.gradient), 0.0))

    def whole(self, factors_B: torch.Tensor) -> Whole:
        """The gradients, each times its float32 factor, rounded to whole numbers.

        What is beyond 32 bits becomes a number that no check lets through.
        """
        numbers = (self.gradient * _like(factors_B, self.gradient)).round_().to(torch.int32)
        return Whole(_exact_squares(numbers), numbers.sum(dim=0, dtype=torch.int32))

    def of(self, record: int, like: torch.Tensor) -> torch.Tensor:
        """One record's gradient, in the parameter's shape."""
        return self.gradient[record].view(like.shape)


@dataclass
class Rows:
    """Per-record gradients that are zero but for a few rows: an embedding's.

    Attributes:
        record_of: record of each row, (R,), ascending.
        row_of: number of each row, (R,); each once per record.
        values: (R, N) float32.
        records: B.
    """

    record_of: torch.Tensor
    row_of: torch.Tensor
    values: torch.Tensor
    records: int

    def squared_norms(self) -> torch.Tensor:
        """See ``Dense.squared_norms``."""
        rows = torch.bincount(self.record_of, minlength=self.records).tolist()
        return _squares([block.flatten() for block in self.values.split(rows)])

    def without(self, bad_B: torch.Tensor) -> Rows:
        """The same with zeros for some records."""
        values = self.values.masked_fill(bad_B[self.record_of][:, None], 0.0)
        return Rows(self.record_of, self.row_of, values, self.records)

    def whole(self, factors_B: torch.Tensor) -> Whole:
        """See ``Dense.whole``."""
        numbers = (self.values * factors_B[self.record_of][:, None]).round_().to(torch.int32)
        return Whole(self._over_rows(_exact_squares(numbers)), numbers, self.row_of)

    def of(self, record: int, like: torch.Tensor) -> torch.Tensor:
        """One record's gradient, in the parameter's shape."""
        own = self.record_of == record
        return torch.zeros_like(like, dtype=torch.float32).index_add_(0, self.row_of[own], self.values[own])

    def dense(self, rows: int) -> torch.Tensor:
        """The same with all rows, (B, rows, N)."""
        gradient = self.values.new_zeros((self.records, rows, self.values.shape[1]))
        gradient[self.record_of, self.row_of] = self.values
        return gradient

    def _over_rows(self, values_R: torch.Tensor) -> torch.Tensor:
        return values_R.new_zeros(self.records).index_add_(0, self.record_of, values_R)


PerRecord = Dense | Rows
Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_LARGE = 64


def product(left_BTM: torch.Tensor, right_BTN: torch.Tensor, multiply: Multiply | None) -> Dense:
    """Per-record gradients: the product of a layer's two factors, record by record.

    Args:
        left_BTM: the left factor.
        right_BTN: the right factor.
        multiply: the layer's own product of (M, T) and (N, T), where it has one that is faster for large ones.
    """
    left_BMT, right_BTN = left_BTM.float().transpose(1, 2), right_BTN.float()
    if multiply is None or min(left_BTM.shape[2], right_BTN.shape[2]) < _LARGE:
        return Dense(torch.bmm(left_BMT, right_BTN))
    pairs = zip(left_BMT, right_BTN.transpose(1, 2), strict=True)
    return Dense(torch.stack([multiply(left_MT, right_NT) for left_MT, right_NT in pairs]))


def rows(ids_BT: torch.Tensor, right_BTN: torch.Tensor) -> Rows:
    """Per-record gradients of an embedding: positions of a record that name the same row are added, in order."""
    records, width = len(ids_BT), int(ids_BT.max()) + 1 if ids_BT.numel() else 1
    named = ids_BT + width * torch.arange(records, device=ids_BT.device)[:, None]
    distinct, place = torch.unique(named, return_inverse=True)
    sums = right_BTN.new_zeros((len(distinct), right_BTN.shape[2]), dtype=torch.float32)
    sums.index_add_(0, place.flatten(), right_BTN.float().flatten(0, 1))
    return Rows(distinct // width, distinct % width, sums, records)


def combine(pieces: Sequence[PerRecord], parameter: torch.Tensor) -> PerRecord:
    """One parameter's per-record gradients from all its uses: several where weights are tied."""
    if len(pieces) == 1:
        return pieces[0]
    dense = [piece.dense(len(parameter)) if isinstance(piece, Rows) else piece.gradient for piece in pieces]
    return Dense(sum(dense[1:], start=dense[0]))


class ByParameter:
    """The per-record gradients of some records, parameter by parameter."""

    def __init__(self, gradients: Mapping[str, PerRecord]) -> None:
        self._gradients = dict(gradients)

    def squared_norms(self) -> torch.Tensor:
        """Each record's squared norm over all parameters, (B,) float64: see ``Dense.squared_norms``."""
        first, *others = [gradient.squared_norms() for gradient in self._gradients.values()]
        return sum(others, start=first)  # one after the other, in the same order for any number of records

    def without(self, bad_B: torch.Tensor) -> ByParameter:
        """The same with zeros for some records."""
        return ByParameter({name: gradient.without(bad_B) for name, gradient in self._gradients.items()})

    def whole(self, factors_B: torch.Tensor) -> dict[str, Whole]:
        """Each parameter's share of what is added."""
        return {name: gradient.whole(factors_B) for name, gradient in self._gradients.items()}

    def of(self, record: int, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One record's gradient; zero for parameters that the losses don't depend on."""
        return {
            name: self._gradients[name].of(record, like)
            if name in self._gradients
            else torch.zeros_like(like, dtype=torch.float32)
            for name, like in parameters.items()
        }


def _squares(records: Iterable[torch.Tensor]) -> torch.Tensor:
    """Squared length of each record's vector, one by one: how many there are would decide how torch cuts the sum."""
    norms = [torch.linalg.vector_norm(values, dtype=torch.float64) for values in records]
    return torch.stack(norms).square()


def _exact_squares(numbers: torch.Tensor) -> torch.Tensor:
    """Squared length of each record's whole numbers, float64: rounding undoes the error of the square root."""
    squares: torch.Tensor = torch.linalg.vector_norm(numbers.flatten(1).double(), dim=1).square().round()
    return squares


def _like(values_B: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return values_B.view(-1, *[1] * (gradient.dim() - 1))
