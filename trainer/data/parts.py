"""Preparation in parts of some thousand rows: each step on a part reads a file and writes one, whole or not at all.

So parts can be done in any order, on any process, and a killed preparation goes on with those that are missing.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from configs.storage.files import canonical_json, write_atomic
from trainer.data.cleaning import Candidate, CleaningCounts, Copies, candidates, changed, normalise
from trainer.data.packing import Document, token_dtype
from trainer.data.tokenizer import load_tokenizer

PART_ROWS = 2000
MapParts = Callable[[Callable[[int], object], Sequence[int]], Iterator[int]]
"""Calls a function on each of some numbers, in any order and on any process; yields a number when it is done."""


class Deidentify(Protocol):
    """What replaces identifiers in a text, as ``Deidentifier`` in ``deidentify.py`` does. It can be pickled."""

    @property
    def digest(self) -> str:
        """Digest of everything that shapes its results."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Spans replaced so far, by kind."""

    def __call__(self, text: str, /) -> str:
        """The text without its identifiers."""


def one_after_the_other(function: Callable[[int], object], numbers: Sequence[int]) -> Iterator[int]:
    """``MapParts`` in this process."""
    for number in numbers:
        function(number)
        yield number


@dataclass(frozen=True)
class Parts:
    """The files of one preparation.

    Attributes:
        folder: where they are; on a cluster, one that all nodes share.
    """

    folder: Path

    def path(self, step: str, number: int) -> Path:
        """A part's file after a step."""
        return self.folder / step / f"part-{number:06d}.parquet"

    def missing(self, step: str, count: int) -> list[int]:
        """Parts that a step has not done."""
        return [number for number in range(count) if not self.path(step, number).exists()]

    def write_rows(self, rows: Iterable[tuple[str, str]]) -> int:
        """Cuts (corpus, text) rows into parts. Returns their number."""
        rows, count = iter(rows), 0
        while part := list(islice(rows, PART_ROWS)):
            corpora, texts = zip(*part, strict=True)
            _write(self.path("rows", count), {"corpus": corpora, "text": texts})
            count += 1
        return count

    def clean(self, number: int, *, min_characters: int, deidentify: Deidentify | None) -> None:
        """Normalises a part's texts, drops the short ones, and sketches the others for the search of copies."""
        rows = _read(self.path("rows", number))
        before = Counter(deidentify.counts) if deidentify else Counter()
        texts = rows["text"] if deidentify is None else [deidentify(text) for text in rows["text"]]
        normalised = [normalise(text) for text in texts]
        found = list(candidates(normalised, min_characters))
        replaced = Counter(deidentify.counts) - before if deidentify else {}
        _write(
            self.path("clean", number),
            {
                "corpus": [rows["corpus"][candidate.place] for candidate in found],
                "text": [candidate.text for candidate in found],
                "sketch": [candidate.sketch for candidate in found],
            },
            {
                "read": len(texts),
                "changed": sum(map(changed, texts, normalised)),
                "too_short": len(texts) - len(found),
                "replaced": dict(replaced),
            },
        )

    def drop_copies(self, count: int, similarity: float) -> tuple[CleaningCounts, Counter[str], Counter[str]]:
        """Drops copies over all parts, in their order: the first of a group stays.

        Returns:
            What was dropped over all steps, what was replaced by kind, and how many documents each corpus has left.
        """
        counts, replaced, left, copies = CleaningCounts(), Counter[str](), Counter[str](), Copies(similarity)
        for number in range(count):
            rows, facts = _read(self.path("clean", number)), _facts(self.path("clean", number))
            counts.read += facts["read"]
            counts.changed += facts["changed"]
            counts.too_short += facts["too_short"]
            replaced.update(facts["replaced"])
            texts = zip(rows["text"], rows["sketch"], strict=True)
            kept = [copies.keep(Candidate(place, *text), counts) for place, text in enumerate(texts)]
            left.update(compress(rows["corpus"], kept))
            _write(self.path("kept", number), {"kept": kept})
        return counts, replaced, left

    def texts(self, count: int) -> Iterator[str]:
        """Every document that is left."""
        for number in range(count):
            yield from (text for _, text in self._left(number))

    def _left(self, number: int) -> list[tuple[str, str]]:
        """Corpus and text of the documents of a part that are no copies."""
        rows, kept = _read(self.path("clean", number)), _read(self.path("kept", number))["kept"]
        return list(compress(zip(rows["corpus"], rows["text"], strict=True), kept))

    def encode(self, number: int, *, tokenizer_directory: Path, held_out: Callable[[str], bool]) -> None:
        """Tokenises what is left of a part; every document is ended by the end-of-text token."""
        tokenizer = load_tokenizer(tokenizer_directory)
        dtype = token_dtype(len(tokenizer))
        left = self._left(number)
        tokenizer.backend_tokenizer.encode_special_tokens = True  # a text that spells one is text
        encoded = tokenizer.backend_tokenizer.encode_batch([text for _, text in left], add_special_tokens=False)
        ids = [np.asarray([*item.ids, tokenizer.eos_token_id], dtype).tobytes() for item in encoded]
        _write(
            self.path("tokens", number),
            {
                "corpus": [corpus for corpus, _ in left],
                "held_out": [held_out(text) for _, text in left],
                "characters": [len(text) for _, text in left],
                "ids": ids,
            },
        )

    def encoded(self, count: int, corpus: str | None, *, held_out: bool, vocab_size: int) -> Iterator[Document]:
        """The tokenised documents of one corpus, or of all, on one side of the split."""
        dtype = token_dtype(vocab_size)
        for number in range(count):
            rows = _read(self.path("tokens", number))
            for name, side, characters, ids in zip(*rows.values(), strict=True):
                if side == held_out and corpus in (None, name):
                    yield Document(np.frombuffer(ids, dtype), characters)


def _write(path: Path, columns: dict[str, Sequence[Any]], facts: Mapping[str, Any] | None = None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: list(values) for name, values in columns.items()})
    table = table.replace_schema_metadata({"facts": canonical_json(dict(facts or {}))})
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    write_atomic(path, buffer.getvalue().to_pybytes())


def _read(path: Path) -> dict[str, list[Any]]:
    import pyarrow.parquet as pq

    return dict(pq.read_table(path).to_pydict())


def _facts(path: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq

    return dict(json.loads(pq.read_schema(path).metadata[b"facts"]))
