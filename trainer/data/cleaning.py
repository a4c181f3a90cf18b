"""Cleaning of PUBLIC text: normalisation, exact and near duplicates.

None of this may touch private records: whether a record is a duplicate depends on other records, which no
record-level guarantee allows. And none of it goes by a text's language: what is dropped or changed follows from the
rules that are written here.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from configs.storage.files import digest_bytes

# Control characters but for tab and the line ends that splitlines() knows, and the byte order mark of a file that was
# joined to another. Joiners, marks of direction, soft hyphens and zero-width spaces are part of writing, and stay.
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff]")
_BLANK_LINES = re.compile(r"\n{4,}")
RULES = 2
"""Version of what ``normalise`` does; raise it where it gives another text."""
UNSPACED = r"[\p{LB=ID}\p{LB=CJ}\p{LB=SA}]"
"""A character of a script without spaces between words, by Unicode's line breaking classes."""
# A word is a run of letters, digits and marks. Where a script has no spaces between words each character is one, and so
# is each symbol beyond ASCII: some scripts are made of them.
_WORD = UNSPACED + r"\p{M}*|[\w\p{M}]+|[^\x00-\x7f\s\p{P}\p{Cc}\p{Cf}]"
_SHINGLE_WORDS = 5
_PERMUTATIONS = 64


@dataclass
class CleaningCounts:
    """What cleaning did, in documents.

    Attributes:
        changed: those in which ``normalise`` changed more than white space.
    """

    read: int = 0
    changed: int = 0
    too_short: int = 0
    exact_duplicates: int = 0
    near_duplicates: int = 0
    kept: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For the corpus manifest."""
        return asdict(self)


def normalise(text: str) -> str:
    """Unicode NFC, no control characters, one kind of line end, no blanks at ends of lines, at most two blank lines.

    Blanks before and between words stay: code and tables are made of them. Not NFKC, which takes ligatures,
    superscripts and wide letters for others.
    """
    text = unicodedata.normalize("NFC", _CONTROL.sub("", text))
    lines = (line.replace("\x1f", " ").rstrip() for line in text.splitlines())
    return _BLANK_LINES.sub("\n\n\n", "\n".join(lines)).strip("\n")


def changed(text: str, normalised: str) -> bool:
    """Whether ``normalise`` changed more than white space."""
    return text != normalised and text.split() != normalised.split()


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
    """Those of normalised texts that are long enough, sketched (MinHash; Broder 1997, datasketch).

    Args:
        texts: normalised.
        min_characters: code points that a text has at least.
    """
    from datasketch import LeanMinHash, MinHash

    clean = [(place, text) for place, text in enumerate(texts) if len(text) >= min_characters]
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
    import regex

    words = regex.findall(_WORD, text.lower())
    if len(words) < _SHINGLE_WORDS:  # all signs of it count, lest texts of signs alone be copies of each other
        words = list("".join(text.lower().split()))
    last = max(1, len(words) - _SHINGLE_WORDS + 1)
    return [" ".join(words[i : i + _SHINGLE_WORDS]).encode() for i in range(last)]
