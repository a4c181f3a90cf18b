"""What reading and cleaning replaced, dropped, shortened or changed, and the table that shows it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from trainer.data.reading.files import SourceFiles

LOST = "\udc80"
"""Stands for invalid bytes until ``mended`` has counted them. Half a character, as no encoding gives."""
WARNED = 0.01  # share above which a kind of change is worth a warning
_UNFIT = re.compile("[\\0\ud800-\udfff]")


@dataclass
class ReadCounts:
    """What was seen while reading, in rows; counts and names of private data are for their steward's eyes only.

    Attributes:
        rows: rows read, those that were left out included.
        invalid_bytes: texts in which bytes that the file's encoding can't read were replaced.
        half_characters: texts in which halves of surrogate pairs were replaced; JSON can hold them.
        nul: texts in which NUL characters were replaced.
        empty: rows without text, which were left out.
        without_unit: rows without a silo or unit, which were left out.
    """

    rows: int = 0
    invalid_bytes: int = 0
    half_characters: int = 0
    nul: int = 0
    empty: int = 0
    without_unit: int = 0

    files: SourceFiles | None = field(default=None, compare=False)
    """Those of the source, where it is a path."""
    place: tuple[str, int] = field(default=("", 0), compare=False)
    """Where the last row stands: the file with the word for what is counted there, and the number."""

    @property
    def where(self) -> str:
        """The last row's place, as messages begin: ``notes.csv, line 7``."""
        name, number = self.place
        return f"{name} {number}"

    def numbers(self) -> dict[str, int]:
        """The counts alone."""
        return {known.name: getattr(self, known.name) for known in fields(self) if known.compare}

    def add(self, other: "ReadCounts") -> None:
        """Adds what was counted elsewhere."""
        self.rows += other.rows
        self.invalid_bytes += other.invalid_bytes
        self.half_characters += other.half_characters
        self.nul += other.nul
        self.empty += other.empty
        self.without_unit += other.without_unit


def mended(text: str, counts: ReadCounts) -> str:
    """The text with U+FFFD for every character that was lost or that no encoding has, and for NUL; counted."""
    if "\0" not in text and (text.isascii() or not _UNFIT.search(text)):
        return text
    found = set(_UNFIT.findall(text))
    counts.invalid_bytes += LOST in found
    counts.nul += "\0" in found
    counts.half_characters += bool(found - {LOST, "\0"})
    return _UNFIT.sub("\ufffd", text)


@dataclass(frozen=True)
class Changed:
    """One line of the table.

    Attributes:
        what: was done, to what.
        count: how often.
        of: how often it could have been.
    """

    what: str
    count: int
    of: int


def reading(counts: ReadCounts) -> list[Changed]:
    """What reading did to the rows."""
    done = {
        "replaced: invalid bytes": counts.invalid_bytes,
        "replaced: half characters": counts.half_characters,
        "replaced: NUL": counts.nul,
        "dropped: no text": counts.empty,
    }
    return [Changed(what, count, counts.rows) for what, count in done.items()]


def of_corpora(metadata: Mapping[str, Any]) -> list[Changed]:
    """What a preparation did to the public text, by its manifest's metadata; empty for one of an earlier version."""
    if "reading" not in metadata:
        return []
    counts, cleaning = ReadCounts(**metadata["reading"]), metadata["cleaning"]
    done = {
        "dropped: shorter than data.min_characters": cleaning["too_short"],
        "dropped: exact copies": cleaning["exact_duplicates"],
        "dropped: near copies": cleaning["near_duplicates"],
        "changed by cleaning, beyond white space": cleaning["changed"],
    }
    return [*reading(counts), *(Changed(what, count, counts.rows) for what, count in done.items())]


def table(title: str, lines: Sequence[Changed]) -> list[str]:
    """Lines for people: all of the table, and a warning for each that is above 1%."""
    width = max((len(line.what) for line in lines), default=0)
    shown = (f"  {line.what:{width}} {line.count:>12,} of {line.of:>12,} {_share(line)}" for line in lines)
    return [title, *shown, *warnings(lines)]


def warnings(lines: Iterable[Changed]) -> list[str]:
    """A line for each kind of change above 1%."""
    return [
        f"warning: {line.what}: {_share(line).strip()}, which is more than {WARNED:.0%}; look at the data"
        for line in lines
        if line.count > WARNED * line.of
    ]


def _share(line: Changed) -> str:
    return f"{line.count / line.of:>7.2%}" if line.of else f"{'-':>7}"
