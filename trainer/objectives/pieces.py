"""What objectives share: examples, pieces of documents as sequences of their own, sums of nats, and chance."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from trainer.data.order import Int64s
from trainer.data.packing import Windows

IGNORED = -100
"""Stands where nothing is predicted."""
_DRAWS = 0x64726177  # tells these draws from those of the data's order, which are numbered from 0


class Examples(NamedTuple):
    """A micro-batch as an objective asks for it.

    Attributes:
        inputs: arrays, a row for each sequence.
        counts: how many targets each of the objective's sums is over.
    """

    inputs: dict[str, Int64s]
    counts: list[int]


def sequences(windows: Windows, row: int) -> Iterator[Int64s]:
    """What a window holds, as sequences none of which may see another one: itself, or its pieces of documents.

    Pieces of one token are left out, since nothing in them can be asked: padding is made of them.
    """
    tokens_T = windows.tokens[row]
    if windows.positions is None:
        yield tokens_T
        return
    starts = np.flatnonzero(windows.positions[row] == 0)
    found = [piece for piece in np.split(tokens_T, starts[1:]) if len(piece) > 1]
    yield from found or [tokens_T[:1]]


def padded(rows: Sequence[Int64s], filling: int) -> Int64s:
    """Rows of one length, filled up on the right."""
    longest = max(len(row) for row in rows)
    return np.stack([np.pad(row, (0, longest - len(row)), constant_values=filling) for row in rows])


def num_targets(targets_BT: Int64s) -> int:
    """Tokens that are to be predicted."""
    return int(np.count_nonzero(targets_BT != IGNORED))


def not_padding(rows: Sequence[Int64s]) -> dict[str, Int64s]:
    """The attention mask of padded rows; none where nothing is padded."""
    if len({len(row) for row in rows}) == 1:
        return {}
    return {"attention_mask": padded([np.ones(len(row), dtype=np.int64) for row in rows], 0)}


def chance(seed: int, windows: Windows, row: int) -> np.random.Generator:
    """What is drawn for a window: a function of the run's seed and the window's place in the order of the data alone.

    So it is the same on any number of ranks, and after a restart. Validation has draws of its own, always the same.
    """
    return np.random.default_rng([seed, _DRAWS, int(windows.held_out), int(windows.numbers[row])])


def nats(logits_BTV: Any, targets_BT: Any) -> Any:
    """Sum of the targets' negative log-likelihood, in nats."""
    from torch.nn import functional

    return functional.cross_entropy(
        logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="sum", ignore_index=IGNORED
    )
