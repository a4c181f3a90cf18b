"""Cleaning of PUBLIC text: normalisation, exact and near duplicates.

None of this may touch private records: whether a record is a duplicate depends on other records, which no
record-level guarantee allows (``privacy`` design, "Words").
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from configs.artifacts import digest_bytes

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


def clean(
    documents: Iterable[str], min_characters: int, similarity: float, counts: CleaningCounts
) -> Iterator[tuple[int, str]]:
    """Yields the documents worth training on with their places, in their order; the first of duplicates stays.

    Near duplicates are found by MinHash with locality-sensitive hashing over 5-word shingles (Broder 1997; datasketch).

    Args:
        documents: public texts.
        min_characters: shorter ones are dropped.
        similarity: Jaccard similarity from which two documents count as the same.
        counts: filled while reading.
    """
    from datasketch import MinHash, MinHashLSH

    texts = _exact(documents, min_characters, counts)
    sketches = MinHash.bulk([_shingles(text) for text in texts.values()], num_perm=_PERMUTATIONS)
    index = MinHashLSH(threshold=similarity, num_perm=_PERMUTATIONS)
    for position, ((place, text), sketch) in enumerate(zip(texts.items(), sketches, strict=True)):
        if any(sketch.jaccard(sketches[other]) >= similarity for other in index.query(sketch)):
            counts.near_duplicates += 1
            continue
        index.insert(position, sketch)
        counts.kept += 1
        yield place, text


def _exact(documents: Iterable[str], min_characters: int, counts: CleaningCounts) -> dict[int, str]:
    kept: dict[int, str] = {}
    seen: set[str] = set()
    for place, document in enumerate(documents):
        counts.read += 1
        text = normalise(document)
        digest = digest_bytes(text.encode())
        if len(text) < min_characters:
            counts.too_short += 1
        elif digest in seen:
            counts.exact_duplicates += 1
        else:
            seen.add(digest)
            kept[place] = text
    return kept


def _shingles(text: str) -> list[bytes]:
    words = _WORD.findall(text.lower())
    last = max(1, len(words) - _SHINGLE_WORDS + 1)
    return [" ".join(words[i : i + _SHINGLE_WORDS]).encode() for i in range(last)]
