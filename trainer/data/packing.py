"""Token files: documents joined by the end-of-text token, as little-endian uint16, read through a memory map.

Which tokens are sample i of step s is a pure function of (seed, s, i): no loader state to save, and any number of
ranks reads disjoint samples of the same global batch.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

TOKEN_DTYPE = np.dtype("<u2")


def pack(documents: Iterable[str], tokenizer: Any, path: Path) -> dict[str, int]:
    """Writes documents one after the other, each ended by the end-of-text token.

    Returns:
        Counts: ``documents``, ``tokens``, ``characters``.
    """
    counts = {"documents": 0, "tokens": 0, "characters": 0}
    backend = tokenizer.backend_tokenizer
    with path.open("wb") as file:
        for document in documents:
            ids = backend.encode(document, add_special_tokens=False).ids
            np.asarray([*ids, tokenizer.eos_token_id], dtype=TOKEN_DTYPE).tofile(file)
            counts["documents"] += 1
            counts["tokens"] += len(ids) + 1
            counts["characters"] += len(document)
    return counts


class TokenFile:
    """A packed file cut into windows of ``context_length`` tokens; the tail that fills no window is left out."""

    def __init__(self, path: Path, context_length: int) -> None:
        self._tokens = np.memmap(path, dtype=TOKEN_DTYPE, mode="r")
        self._context_length = context_length
        self.num_windows = len(self._tokens) // context_length

    def windows(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens of the given windows, shape (len(indices), context_length)."""
        starts = indices[:, None] * self._context_length
        return np.asarray(self._tokens[starts + np.arange(self._context_length)], dtype=np.int64)


class Cursor:
    """Maps (step, position in the global batch) to a window: a fresh permutation an epoch, nothing skipped."""

    def __init__(self, num_windows: int, batch_size: int, seed: int) -> None:
        self._num_windows, self._batch_size, self._seed = num_windows, batch_size, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def window(self, step: int, position: int) -> int:
        """Index of the window that is sample ``position`` of step ``step`` (both from 0)."""
        epoch, offset = divmod(step * self._batch_size + position, self._num_windows)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self._num_windows)
        return int(self._order[offset])

    def rank_windows(self, step: int, rank: int, world_size: int) -> npt.NDArray[np.int64]:
        """The windows of one rank in a step: positions rank, rank + world_size, ... of the global batch."""
        positions = range(rank, self._batch_size, world_size)
        return np.asarray([self.window(step, position) for position in positions], dtype=np.int64)
