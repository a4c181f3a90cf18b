"""Tokens of which some are to be learnt. Words are text, whatever they spell."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer

from trainer.tasks.task import IGNORED, Encoded


class Mark(IntEnum):
    """What a piece of a text is to a model; of two that share a token the greater one counts."""

    FRAME = 0
    """The template's, the same in every example."""
    READ = 1
    """What the record says, to be read alone."""
    LEARNT = 2
    """To be learnt."""


Part = tuple[str, Mark]


@dataclass
class Marked:
    """Tokens one after the other.

    Attributes:
        ids: the tokens.
        marks: what each is.
    """

    ids: list[int] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    def add(self, ids: Iterable[int], marks: Iterable[Mark]) -> None:
        """Goes on with these."""
        self.ids += ids
        self.marks += marks

    def example(self, context_length: int) -> Encoded | None:
        """What fits the context, up to the last token that is to be learnt; None where there is none left.

        The first token follows nothing, and can't be learnt.
        """
        places = [place for place, mark in enumerate(self.marks) if mark == Mark.LEARNT and place]
        kept = [place for place in places if place < context_length]
        if not kept:
            return None
        ids = tuple(self.ids[: kept[-1] + 1])
        wanted = set(kept)
        target = tuple(token if place in wanted else IGNORED for place, token in enumerate(ids))
        # The first token stays, whatever it is: without it the next one would follow nothing.
        words = bytes(mark == Mark.READ and place > 0 for place, mark in enumerate(self.marks[: len(ids)]))
        return Encoded(ids, characters=0, truncated=len(kept) < len(places), target=target, words=words)


def plain_backend(tokenizer: Any, never: Iterable[str] = ()) -> Tokenizer:
    """A copy of what turns text into tokens, that takes no special token from a text, nor one of these added ones."""
    backend = own_backend(tokenizer)
    backend.add_special_tokens([AddedToken(content, special=True) for content in never])
    backend.encode_special_tokens = True
    return backend


def own_backend(tokenizer: Any) -> Tokenizer:
    """A copy of a tokenizer's backend that neither cuts nor fills up."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = False
    return backend


def encoded(backend: Tokenizer, parts: Sequence[Part]) -> tuple[list[int], list[Mark]]:
    """Tokens of the parts as one text: a token that reaches into a part that is to be learnt is to be learnt."""
    found = backend.encode("".join(text for text, _ in parts), add_special_tokens=False)
    marks = b"".join(bytes([mark]) * len(text) for text, mark in parts)  # of each character
    return found.ids, [Mark(max(marks[first : max(last, first + 1)], default=0)) for first, last in found.offsets]


def words_of(found: Encoding) -> bytes:
    """1 for each token of a text, 0 for those that a tokenizer puts around it."""
    return bytes(not special for special in found.special_tokens_mask)
