"""What a drawn text must be to count as a record: looked at by itself alone, never beside a record of a silo's."""

from collections import Counter
from collections.abc import Sequence
from unicodedata import category

from trainer.inference.generation import Drawn

SHORTEST = 4
"""Tokens of a text, at least."""
_RUN = 4
_MOST_REPEATED = 0.2
_MOST_OF_ONE = 0.5
_LEAST_READABLE = 0.5


class Filter:
    """Says of a text why it is dropped.

    Args:
        tokenizer: of the model.
        full: whether a text may end because the model's context is full, as training records do that are longer; one
            that ends sooner without an end was cut.
    """

    def __init__(self, tokenizer: object, *, full: bool) -> None:
        self._special = frozenset[int](getattr(tokenizer, "all_special_ids", ()))
        self._spelt = tuple(text for text in getattr(tokenizer, "all_special_tokens", ()) if text.strip())
        self._full = full

    def fault(self, drawn: Drawn) -> str:
        """Why a text is dropped; empty: it is not."""
        checks = {
            "special tokens": self._has_special(drawn),
            "no end": not (drawn.ended or self._full),
            "too short": len(drawn.ids) < SHORTEST or not drawn.text.strip(),
            "repeats itself": _repeats(drawn.ids),
            "unreadable": not _readable(drawn.text),
        }
        return next((name for name, found in checks.items() if found), "")

    def _has_special(self, drawn: Drawn) -> bool:
        return not self._special.isdisjoint(drawn.ids) or any(spelt in drawn.text for spelt in self._spelt)


def _repeats(ids: Sequence[int]) -> bool:
    """Whether many runs of tokens come again, or half of all tokens are one."""
    if not ids:
        return False
    runs = [tuple(ids[place : place + _RUN]) for place in range(len(ids) - _RUN + 1)]
    again = len(runs) - len(set(runs))
    return again > _MOST_REPEATED * len(runs) or max(Counter(ids).values()) > _MOST_OF_ONE * len(ids)


def _readable(text: str) -> bool:
    """Whether most signs are letters, marks or digits of some script, and none is broken or controls a terminal."""
    signs = [sign for sign in text if not sign.isspace()]
    kinds = [category(sign) for sign in signs]
    if "\N{REPLACEMENT CHARACTER}" in text or "Cc" in kinds:
        return False
    return sum(kind[0] in "LMN" for kind in kinds) >= _LEAST_READABLE * len(signs)
