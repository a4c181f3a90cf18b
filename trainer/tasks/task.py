"""What a record is to a model, whatever the task."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """One record as tokens.

    Attributes:
        ids: end-of-text, the text's tokens, and end-of-text where it fits the context.
        characters: characters of the text that the tokens cover.
        truncated: whether the record was longer than the context.
    """

    ids: tuple[int, ...]
    characters: int
    truncated: bool


def by_length(records: Sequence[Encoded], micro_batch_size: int) -> Iterator[list[Encoded]]:
    """Micro-batches of records of like length: less padding, the same sum."""
    ordered = sorted(records, key=lambda record: len(record.ids))
    for start in range(0, len(ordered), micro_batch_size):
        yield list(ordered[start : start + micro_batch_size])
