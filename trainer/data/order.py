"""Which window is sample i of step s: a pure function of (seed, s, i), so there is no loader state to save.

Any number of ranks reads disjoint samples of the same global batch, and reading starts at any step at once: nothing is
shuffled ahead or replayed.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
Uint64s = npt.NDArray[np.uint64]
SkippedData = Sequence[tuple[int, int]]

_CYCLE = 1024
_ROUNDS = 6


class Order:
    """The order of the samples: corpora interleaved by weight, each one in a fresh permutation per epoch.

    Args:
        num_windows: windows of each corpus.
        weights: share of each corpus in the samples, up to a factor; 0: none.
        batch_size: samples per step.
        seed: of the permutations.
        skipped: ranges [first, end) of batches that are passed over.
        first: number of the first batch that is of this order.
        before: samples of each corpus that other orders have taken before; this one goes on after them.
    """

    def __init__(
        self,
        num_windows: Sequence[int],
        weights: Sequence[float],
        batch_size: int,
        seed: int,
        skipped: SkippedData = (),
        first: int = 0,
        before: Int64s | None = None,
    ) -> None:
        self._num_windows, self._batch_size, self._seed = num_windows, batch_size, seed
        self._counts = _shares(weights)
        self._skipped, self._first = merged(skipped), first
        self._before = np.zeros(len(num_windows), dtype=np.int64) if before is None else before

    def batch_number(self, step: int) -> int:
        """The batch that a step (from 0) trains on: those that are skipped are passed over."""
        number = step
        for first, end in self._skipped:
            if number >= first:
                number += end - first
        return number

    def batch(self, step: int) -> tuple[Int64s, Int64s]:
        """Corpus and window of each sample of a step, by position in the global batch."""
        start = (self.batch_number(step) - self._first) * self._batch_size
        samples = start + np.arange(self._batch_size, dtype=np.int64)
        corpora, numbers = self._interleaved(samples)
        numbers += self._before[corpora]
        windows = np.empty_like(samples)
        for corpus, size in enumerate(self._num_windows):
            mine = corpora == corpus
            epochs, offsets = np.divmod(numbers[mine], size)
            shuffled = np.empty_like(offsets)
            for epoch in np.unique(epochs):
                now = epochs == epoch
                shuffled[now] = permuted(offsets[now], size, (self._seed, corpus, int(epoch)))
            windows[mine] = shuffled
        return corpora, windows

    def taken(self, steps: int) -> Int64s:
        """Samples of each corpus up to so many steps of this order, those before it included, where none is skipped."""
        cycles, rest = divmod(steps * self._batch_size, int(self._counts.sum()))
        corpora, _ = self._interleaved(np.arange(rest, dtype=np.int64) + cycles * int(self._counts.sum()))
        return self._before + cycles * self._counts + np.bincount(corpora, minlength=len(self._counts))

    def _interleaved(self, samples: Int64s) -> tuple[Int64s, Int64s]:
        """Each sample's corpus, and its number among the samples of that corpus."""
        cycles, slots = np.divmod(samples, int(self._counts.sum()))
        corpora, numbers = np.empty_like(samples), np.empty_like(samples)
        for cycle in np.unique(cycles):
            order = np.repeat(np.arange(len(self._counts)), self._counts)
            np.random.default_rng([self._seed, int(cycle)]).shuffle(order)
            # How often each corpus came before: its samples are counted on through the cycles.
            before = (np.cumsum(order[:, None] == np.arange(len(self._counts)), axis=0) - 1)[
                np.arange(len(order)), order
            ]
            now = cycles == cycle
            corpora[now] = order[slots[now]]
            numbers[now] = cycle * self._counts[corpora[now]] + before[slots[now]]
        return corpora, numbers


def merged(ranges: SkippedData) -> list[tuple[int, int]]:
    """The same numbers as sorted ranges that don't touch."""
    result: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if result and first <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((first, end))
    return result


def _shares(weights: Sequence[float]) -> Int64s:
    """Samples of each corpus in a cycle, one at least: exact proportions (largest remainders) in every cycle."""
    there = np.asarray(weights) > 0
    if there.sum() == 1:
        return there.astype(np.int64)
    exact = np.asarray(weights) / np.sum(weights) * _CYCLE
    counts: Int64s = np.maximum(np.floor(exact).astype(np.int64), there)
    left = max(0, _CYCLE - int(counts.sum()))
    counts[np.argsort(counts - exact, kind="stable")[:left]] += 1
    return counts


def permuted(numbers: Int64s, size: int, key: tuple[int, ...]) -> Int64s:
    """Images of numbers below ``size`` under a keyed pseudo-random permutation of 0 .. size - 1.

    A balanced Feistel network over the next power of four, walked until the image is in range (Black and Rogaway
    2002): each image is computed by itself, so a corpus of any size costs no memory and no start-up time.
    """
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
    images = numbers.astype(np.uint64)
    outside = np.ones(len(images), dtype=bool)
    while outside.any():
        left, right = images[outside] >> half, images[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & mask)
        images[outside] = (left << half) | right
        outside = images >= np.uint64(size)
    return images.astype(np.int64)


def _mixed(values: Uint64s) -> Uint64s:
    """The finaliser of SplitMix64 (Steele et al. 2014)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        values = np.asarray((values ^ (values >> np.uint64(shift))) * np.uint64(factor), dtype=np.uint64)
    return values
