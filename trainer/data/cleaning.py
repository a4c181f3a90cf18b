"""Cleaning of PUBLIC text: normalisation, exact and near duplicates.

None of this may touch private records: whether a record is a duplicate depends on other records, which no
record-level guarantee allows.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from configs.storage.files import digest_bytes

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u200b\ufeff]")
_SPACES = re.compile(r"[ \t]+")
_BLANK_LINES = re.compile(r"\n{3,}")
_WORD = re.compile(r"\w+")
_SHINGLE_WORDS = 5
_PERMUTATIONS = 64


@dataclass
class CleaningCounts:
    """What cleaning dropped, in documents."""

    read: int = 0
    too_short: int = 0
    exact_duplicates: int = 0
    near_duplicates: int = 0
    kept: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For the corpus manifest."""
        return asdict(self)


def normalise(text: str) -> str:
    """Unicode NFC, no control characters, single spaces, at most one blank line in a row."""
    text = _CONTROL.sub("", unicodedata.normalize("NFC", text.replace("\r\n", "\n")))
    lines = (_SPACES.sub(" ", line).rstrip() for line in text.split("\n"))
    return _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip()


@dataclass(frozen=True)
class Candidate:
    """A document that may be worth training on.

    Attributes:
        place: its number among the texts it was read with.
        text: normalised.
        sketch: a serialized MinHash of its 5-word shingles.
    """

    place: int
    text: str
    sketch: bytes


def candidates(texts: Sequence[str], min_characters: int) -> Iterator[Candidate]:
    """The texts that are long enough, normalised and sketched (MinHash; Broder 1997, datasketch)."""
    from datasketch import LeanMinHash, MinHash

    clean = [(place, text) for place, text in enumerate(map(normalise, texts)) if len(text) >= min_characters]
    sketches = MinHash.generator((_shingles(text) for _, text in clean), num_perm=_PERMUTATIONS)
    for (place, text), sketch in zip(clean, sketches, strict=True):
        lean = LeanMinHash(sketch)
        serialized = bytearray(lean.bytesize())
        lean.serialize(serialized)
        yield Candidate(place, text, bytes(serialized))


class Copies:
    """Finds exact and near copies among documents that come one after the other; the first of a group stays.

    Near copies are found by locality-sensitive hashing of the sketches.

    Args:
        similarity: estimated Jaccard similarity from which two documents count as the same.
    """

    def __init__(self, similarity: float) -> None:
        from datasketch import MinHashLSH

        self._similarity = similarity
        self._seen: set[str] = set()
        self._sketches: list[Any] = []
        self._index = MinHashLSH(threshold=similarity, num_perm=_PERMUTATIONS)

    def keep(self, candidate: Candidate, counts: CleaningCounts) -> bool:
        """Whether a document is not a copy of one before it; counted."""
        from datasketch import LeanMinHash

        digest = digest_bytes(candidate.text.encode())
        if digest in self._seen:
            counts.exact_duplicates += 1
            return False
        self._seen.add(digest)
        sketch = LeanMinHash.deserialize(candidate.sketch)
        similar = (self._sketches[other] for other in self._index.query(sketch))
        if any(sketch.jaccard(other) >= self._similarity for other in similar):
            counts.near_duplicates += 1
            return False
        self._index.insert(len(self._sketches), sketch)
        self._sketches.append(sketch)
        counts.kept += 1
        return True


def _shingles(text: str) -> list[bytes]:
    words = _WORD.findall(text.lower())
    last = max(1, len(words) - _SHINGLE_WORDS + 1)
    return [" ".join(words[i : i + _SHINGLE_WORDS]).encode() for i in range(last)]
