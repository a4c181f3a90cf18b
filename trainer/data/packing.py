"""Token files: windows of ``context_length`` tokens, little-endian uint16 or uint32, read through a memory map.

Two ways to fill the windows (``data.packing``). ``concatenate`` joins the documents by the end-of-text token and cuts
the stream; what stands before a document's start in its window is visible to it. ``documents`` puts documents, or
pieces of long ones, whole into windows by best fit (Ding et al. 2024, "Fewer truncations improve language modeling"):
a second file has every token's position in its piece, so that attention and loss stay inside a piece.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from configs.errors import InputError
from configs.schema.schema import RunConfig
from configs.storage.manifests import read_manifest

VALIDATION_TOKENS = "tokens-validation.bin"


Packing = Literal["concatenate", "documents"]
DTYPE_FIELD = "token_dtype"  # in a corpus' metadata
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_POSITIONS = ".positions"
_BUFFER_TOKENS = 2**22

Ids = npt.NDArray[np.unsignedinteger[Any]]


def token_dtype(entries: int) -> np.dtype[Any]:
    """The smaller of the types that hold that many different tokens, or places in a window."""
    return _DTYPES["uint16" if entries <= 2**16 else "uint32"]


def stored_dtype(corpus: Path) -> np.dtype[Any]:
    """The type of a corpus' tokens, by its manifest; before manifests named it, it was always uint16.

    Raises:
        InputError: it is one that only another Siloweave knows.
    """
    manifest = read_manifest(corpus, "corpus")
    name = manifest.metadata.get(DTYPE_FIELD, "uint16") if manifest else None
    if name not in tuple(_DTYPES):
        raise InputError(
            f"{corpus}: {DTYPE_FIELD} of its manifest is {name!r}, and this Siloweave reads {' and '.join(_DTYPES)}; "
            f"upgrade Siloweave, or delete {corpus} and run `siloweave prepare` again"
        )
    return _DTYPES[name]


class Document(NamedTuple):
    """A tokenised document.

    Attributes:
        ids: tokens, the end-of-text token last.
        characters: of the text.
    """

    ids: Ids
    characters: int


def pack(
    documents: Iterable[Document], path: Path, context_length: int, packing: Packing, dtype: np.dtype[Any]
) -> dict[str, int]:
    """Writes documents as windows of tokens of a type that holds all of them.

    Returns:
        Counts: ``documents``, ``tokens``, ``characters``, ``windows``, and ``tokens_kept``: those inside windows.
    """
    counts = {"documents": 0, "tokens": 0, "characters": 0}

    def counted() -> Iterator[Ids]:
        for document in documents:
            counts["documents"] += 1
            counts["tokens"] += len(document.ids)
            counts["characters"] += document.characters
            yield document.ids.astype(dtype, casting="safe", copy=False)

    if packing == "concatenate":
        with path.open("wb") as file:
            for ids in counted():
                ids.tofile(file)
        windows = counts["tokens"] // context_length
        return {**counts, "windows": windows, "tokens_kept": windows * context_length}
    windows = _pack_whole(counted(), path, context_length, dtype)
    return {**counts, "windows": windows, "tokens_kept": counts["tokens"]}


def _pack_whole(documents: Iterable[Ids], path: Path, context_length: int, dtype: np.dtype[Any]) -> int:
    windows, place_dtype = 0, token_dtype(context_length)
    with (
        path.open("wb") as tokens,
        path.with_suffix(_POSITIONS).open("wb") as positions,
    ):
        for pieces in _buffers(documents, context_length):
            for window in best_fit([len(piece) for piece in pieces], context_length):
                # Each padding token is a piece of its own at position 0: nothing attends to it, and it is no target.
                row, place = np.zeros(context_length, dtype), np.zeros(context_length, place_dtype)
                start = 0
                for piece in (pieces[index] for index in window):
                    row[start : start + len(piece)] = piece
                    place[start : start + len(piece)] = np.arange(len(piece))
                    start += len(piece)
                row.tofile(tokens)
                place.tofile(positions)
                windows += 1
    return windows


def _buffers(documents: Iterable[Ids], context_length: int) -> Iterator[list[Ids]]:
    """Pieces of at most a window, in lists that fit into memory."""
    pieces: list[Ids] = []
    held = 0
    for document in documents:
        pieces += [document[start : start + context_length] for start in range(0, len(document), context_length)]
        held += len(document)
        if held >= _BUFFER_TOKENS:
            yield pieces
            pieces, held = [], 0
    yield pieces


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing.

    Args:
        lengths: sizes of the pieces, each at most ``capacity``.
        capacity: size of a bin.

    Returns:
        The pieces' indices, bin by bin.
    """
    bins: list[list[int]] = []
    with_space: defaultdict[int, list[int]] = defaultdict(list)
    spaces: list[int] = []  # the keys of with_space that have bins, sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        at = bisect_left(spaces, length)
        if at == len(spaces):
            space, chosen = capacity, len(bins)
            bins.append([])
        else:
            space = spaces[at]
            chosen = with_space[space].pop()
            if not with_space[space]:
                del spaces[at]
        bins[chosen].append(index)
        left = space - length
        if left and not with_space[left]:
            insort(spaces, left)
        if left:
            with_space[left].append(chosen)
    return bins


class TokenFile:
    """A packed file's windows; of a concatenated one, the tail that fills no window is left out."""

    def __init__(self, path: Path, context_length: int, dtype: np.dtype[Any]) -> None:
        self._context_length, place_dtype = context_length, token_dtype(context_length)
        self._tokens = np.memmap(path, dtype=dtype, mode="r")
        self.num_windows = len(self._tokens) // context_length
        self._positions = None
        if path.with_suffix(_POSITIONS).exists():
            self._positions = np.memmap(path.with_suffix(_POSITIONS), dtype=place_dtype, mode="r")

    def windows(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens of the given windows, shape (len(indices), context_length)."""
        return self._rows(self._tokens, indices)

    def positions(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
        """Every token's position in its piece of a document, same shape; None where every window is one piece.

        A token at position 0 is no target.
        """
        return None if self._positions is None else self._rows(self._positions, indices)

    def _rows(self, values: Ids, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        starts = indices[:, None] * self._context_length
        return np.asarray(values[starts + np.arange(self._context_length)], dtype=np.int64)


@dataclass(frozen=True)
class Windows:
    """Windows of packed files, and where they stand in the order of the data.

    Attributes:
        files: of each window.
        indices: of each window in its file, shape (b,).
        numbers: of each window in the order of the data, shape (b,). What an objective draws for a window depends on
            this number, and on no rank or step.
        held_out: whether they are validated on; the numbers are then those of the validation file.
    """

    files: tuple[TokenFile, ...]
    indices: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]
    held_out: bool = False

    @cached_property
    def tokens(self) -> npt.NDArray[np.int64]:
        """Shape (b, context_length)."""
        return np.concatenate([file.windows(index) for file, index in self._each()])

    @cached_property
    def positions(self) -> npt.NDArray[np.int64] | None:
        """Every token's position in its piece of a document, same shape; None where windows are whole."""
        places = [place for file, index in self._each() if (place := file.positions(index)) is not None]
        return np.concatenate(places) if places else None

    def _each(self) -> Iterator[tuple[TokenFile, npt.NDArray[np.int64]]]:
        return zip(self.files, np.split(self.indices, len(self.indices)), strict=True)

    def micro_batches(self, size: int) -> Iterator["Windows"]:
        """At most ``size`` of them at a time."""
        for start in range(0, len(self.indices), size):
            part = slice(start, start + size)
            yield Windows(self.files[part], self.indices[part], self.numbers[part], self.held_out)

    def another(self, row: int, generator: np.random.Generator) -> "Windows":
        """Another window of the same file as a row's; the same one where the file has no other."""
        file, others = self.files[row], self.files[row].num_windows - 1
        step = 1 + int(generator.integers(others)) if others else 0
        return Windows((file,), (self.indices[row : row + 1] + step) % file.num_windows, self.numbers[row : row + 1])


def train_tokens(corpus: str, length: int | None = None) -> str:
    """File name of a corpus' training tokens, those of ``lengths_apart`` with their length."""
    return f"tokens-train-{corpus}.bin" if length is None else f"tokens-train-{corpus}.{length}.bin"


def lengths_apart(config: RunConfig) -> list[int]:
    """Lengths of stages that have files of their own: whole documents are packed anew, a joined text is cut anew."""
    if config.data.packing == "concatenate":
        return []
    return sorted({stage.context_length for stage in config.stages} - {config.model.context_length})
