"""Tokens to text while they come: whole characters alone, and nothing that may be the start of a stop string."""

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_BEFORE = 8  # tokens that the next ones are read behind: a SentencePiece model's blank depends on them


class StreamedText:
    """The text of one request.

    Args:
        backend: of the tokenizer (tokenizers' ``Tokenizer``).
        prompt: tokens that the text goes on with; empty for an answer that stands alone.
        stop: texts before which it ends.
    """

    def __init__(self, backend: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._backend, self._stop = backend, tuple(stop)
        self._ids = list(prompt[-_BEFORE:])
        self._read = len(self._ids)
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be shown with one more token; nothing more once it has stopped."""
        self._ids.append(token)
        before, whole = self._text(self._ids[: self._read]), self._text(self._ids)
        if whole.endswith(_UNFINISHED):
            return ""
        del self._ids[: max(0, len(self._ids) - _BEFORE)]
        self._read = len(self._ids)
        return self._shown(whole[len(before) :], last=False)

    def rest(self) -> str:
        """What was held back, at the end."""
        whole, before = self._text(self._ids), self._text(self._ids[: self._read])
        return "" if self.stopped else self._shown(whole[len(before) :], last=True)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def _shown(self, new: str, *, last: bool) -> str:
        text = self._held + new
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """How many of the text's last characters may be the start of a stop string."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
