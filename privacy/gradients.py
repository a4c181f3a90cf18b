"""Per-record gradients of one parameter, kept as small as their shape allows.

A layer's weight gradient for record b is a product ``left[b]^T right[b]`` summed over positions: for a linear layer of
output gradients and inputs, for an embedding of one-hot rows and output gradients. Either this product is formed at
once (``Instantiated``) or its two factors are kept (``Factored``), whichever has fewer numbers; the same comparison
decides which of the two ways to a norm has fewer multiplications. Bu et al. 2023, "Differentially private optimization
on large model at small cost" (book-keeping, mixed ghost norm); Li et al. 2022 (ghost clipping).

Shape suffixes: B records, T positions, M rows and N columns of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Where positions cancel, a Gram norm is a small difference of large products, and float32 keeps 2^-23 of their size.
# This share of what would stand there without cancelling is added: a norm errs upwards, a clipped gradient downwards.
ROUNDING = 2.0**-20
# A Gram matrix is computed in so many bands, of no fewer rows than a matrix product needs to be fast.
_BANDS, _NARROWEST_BAND = 4, 32


@dataclass(frozen=True)
class Use:
    """One use of a weight in a forward pass, after its backward.

    Attributes:
        left: (B, T, M) float, or (B, T) integers that name the one-hot row of each position.
        right: (B, T, N) float.
        rows: M.
    """

    left: torch.Tensor
    right: torch.Tensor
    rows: int

    @property
    def one_hot(self) -> bool:
        """Whether ``left`` names rows."""
        return not self.left.is_floating_point()

    @property
    def small(self) -> bool:
        """Whether the product has no more numbers than its factors: then it also has the cheaper norm."""
        positions, columns = self.right.shape[1:]
        return not self.one_hot and self.rows * columns <= positions * (self.rows + columns)

    def product(self) -> torch.Tensor:
        """The per-record gradients."""
        if not self.one_hot:
            return torch.bmm(self.left.float().transpose(1, 2), self.right.float())
        records, _, columns = self.right.shape
        product = self.right.new_zeros((records, self.rows, columns), dtype=torch.float32)
        index = self.left[..., None].expand_as(self.right)
        return product.scatter_add_(1, index, self.right.float())

    def add_to(self, total_MN: torch.Tensor, factors_B: torch.Tensor) -> None:
        """Adds the records' gradients, each times its factor."""
        left, right, factors = self.left, self.right.float(), factors_B[:, None, None]
        if self.one_hot:
            total_MN.index_add_(0, left.flatten(), (right * factors).flatten(0, 1))
            return
        left = left.float()
        # The narrower side is copied.
        left, right = (left * factors, right) if left.shape[2] < right.shape[2] else (left, right * factors)
        total_MN.addmm_(left.flatten(0, 1).T, right.flatten(0, 1))


def inner_products(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Of all pairs of positions, (B, T, S); one-hot sides are integers of shape (B, T)."""
    if not first.is_floating_point() and not second.is_floating_point():
        return (first[:, :, None] == second[:, None, :]).float()
    if not first.is_floating_point():
        return inner_products(second, first).transpose(1, 2)
    if not second.is_floating_point():
        return first.float().gather(2, second[:, None, :].expand(-1, first.shape[1], -1))
    return torch.bmm(first.float(), second.float().transpose(1, 2))


class Gram:
    """Inner products of a tensor's positions with each other.

    They are symmetric, so only those from the diagonal on are computed: bands of rows, (B, H, T - first row).
    """

    def __init__(self, side: torch.Tensor) -> None:
        height = max(_NARROWEST_BAND, -(-side.shape[1] // _BANDS))
        starts = range(0, side.shape[1], height)
        self.bands = [inner_products(side[:, start : start + height], side[:, start:]) for start in starts]

    def dot(self, other: Gram) -> torch.Tensor:
        """Inner product of two whole matrices, record by record, shape (B,)."""
        dots_B = torch.zeros((), device=self.bands[0].device)
        for mine, theirs in zip(self.bands, other.bands, strict=True):
            products, rows = mine * theirs, mine.shape[1]
            dots_B = dots_B + products[:, :, :rows].sum(dim=(1, 2)) + 2.0 * products[:, :, rows:].sum(dim=(1, 2))
        return dots_B

    def diagonal(self) -> torch.Tensor:
        """Squared lengths of the positions, (B, T)."""
        return torch.cat([band.diagonal(dim1=1, dim2=2) for band in self.bands], dim=1).clamp(min=0.0)


class SharedGram:
    """Keeps the last Gram matrix: layers with one input (query, key and value) come one after another."""

    def __init__(self) -> None:
        self._side, self._gram = torch.empty(0), Gram(torch.empty(0, 0, 0))

    def of(self, side: torch.Tensor) -> Gram:
        """The Gram matrix of a tensor's positions."""
        if side is not self._side:
            self._side, self._gram = side, Gram(side)
        return self._gram


@dataclass
class Factored:
    """A parameter's per-record gradients as the factors of its uses; several where weights are tied."""

    uses: list[Use]
    shared: SharedGram = field(repr=False)

    def squared_norms(self) -> torch.Tensor:
        """Squared norms, at least the exact ones up to rounding of the factors."""
        if len(self.uses) == 1 and self.uses[0].one_hot:
            return _one_hot_squared_norms(self.uses[0])
        squares_B = uncancelled_B = torch.zeros((), device=self.uses[0].right.device)
        for position, use in enumerate(self.uses):
            left, right = Gram(use.left), self.shared.of(use.right)
            squares_B = squares_B + left.dot(right)
            uncancelled_B = uncancelled_B + (left.diagonal() * right.diagonal()).sqrt().sum(dim=1)
            for other in self.uses[position + 1 :]:  # tied weights
                lefts, rights = inner_products(use.left, other.left), inner_products(use.right, other.right)
                squares_B = squares_B + 2.0 * _dots(lefts, rights)
        return squares_B.clamp(min=0.0) + ROUNDING * uncancelled_B.square()

    def add_to(self, total: torch.Tensor, factors_B: torch.Tensor) -> None:
        """Adds the records' gradients, each times its factor, to a tensor of the parameter's shape."""
        for use in self.uses:
            use.add_to(total, factors_B)


@dataclass
class Instantiated:
    """A parameter's per-record gradients themselves, (B, ...) float32."""

    gradient: torch.Tensor

    def squared_norms(self) -> torch.Tensor:
        """Squared norms."""
        return _dots(self.gradient, self.gradient)

    def add_to(self, total: torch.Tensor, factors_B: torch.Tensor) -> None:
        """Adds the records' gradients, each times its factor, to a tensor of the parameter's shape."""
        total.view(-1).addmv_(self.gradient.flatten(1).T, factors_B)


PerRecord = Factored | Instantiated


def combine(pieces: Sequence[Use | torch.Tensor], shared: SharedGram) -> PerRecord:
    """One parameter's per-record gradients from all its uses.

    Args:
        pieces: uses, or per-record gradients that were formed at once.
        shared: of this backward pass.
    """
    if all(isinstance(piece, Use) for piece in pieces):
        return Factored([piece for piece in pieces if isinstance(piece, Use)], shared)
    formed = [piece.product() if isinstance(piece, Use) else piece for piece in pieces]
    return Instantiated(sum(formed[1:], start=formed[0]))


def _dots(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Inner product of each record's numbers, shape (B,)."""
    dots: torch.Tensor = torch.linalg.vecdot(first.flatten(1), second.flatten(1))
    return dots


def _one_hot_squared_norms(use: Use) -> torch.Tensor:
    """Positions of one record that name the same row are added first; work grows with T, not with its square."""
    records = len(use.left)
    rows = use.left + use.rows * torch.arange(records, device=use.left.device)[:, None]
    distinct, place = torch.unique(rows, return_inverse=True)
    sums = use.right.new_zeros((len(distinct), use.right.shape[2]), dtype=torch.float32)
    sums.index_add_(0, place.flatten(), use.right.float().flatten(0, 1))
    squares = _dots(sums, sums)
    return squares.new_zeros(records).index_add_(0, distinct // use.rows, squares)


class ByParameter:
    """The per-record gradients of one micro-batch, parameter by parameter."""

    def __init__(self, gradients: Mapping[str, PerRecord]) -> None:
        self._gradients = gradients

    def squared_norms(self) -> torch.Tensor:
        """Each record's squared norm over all parameters, float32."""
        squares = [gradient.squared_norms() for gradient in self._gradients.values()]
        return torch.stack(squares).sum(dim=0)

    def add_to(self, sums: dict[str, torch.Tensor], factors_B: torch.Tensor) -> None:
        """Adds the records' gradients, each times its factor."""
        for name, gradient in self._gradients.items():
            gradient.add_to(sums[name], factors_B)
