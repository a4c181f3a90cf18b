"""Tokens of which some are to be learnt. Words are text, whatever they spell."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Tokenizer

from trainer.tasks.task import IGNORED, Encoded

Part = tuple[str, bool]
"""A piece of a text, and whether it is to be learnt."""


@dataclass
class Marked:
    """Tokens one after the other.

    Attributes:
        ids: the tokens.
        learnt: whether each is to be learnt.
    """

    ids: list[int] = field(default_factory=list)
    learnt: list[bool] = field(default_factory=list)

    def add(self, ids: Iterable[int], learnt: Iterable[bool]) -> None:
        """Goes on with these."""
        self.ids += ids
        self.learnt += learnt

    def example(self, context_length: int) -> Encoded | None:
        """What fits the context, up to the last token that is to be learnt; None where there is none left.

        The first token follows nothing, and can't be learnt.
        """
        places = [place for place, learnt in enumerate(self.learnt) if learnt and place]
        kept = [place for place in places if place < context_length]
        if not kept:
            return None
        ids = tuple(self.ids[: kept[-1] + 1])
        wanted = set(kept)
        target = tuple(token if place in wanted else IGNORED for place, token in enumerate(ids))
        return Encoded(ids, characters=0, truncated=len(kept) < len(places), target=target)


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


def encoded(backend: Tokenizer, parts: Sequence[Part]) -> tuple[list[int], list[bool]]:
    """Tokens of the parts as one text: a token that reaches into a part that is to be learnt is to be learnt."""
    found = backend.encode("".join(text for text, _ in parts), add_special_tokens=False)
    wanted = b"".join(bytes([learnt]) * len(text) for text, learnt in parts)  # of each character
    return found.ids, [any(wanted[first : max(last, first + 1)]) for first, last in found.offsets]
