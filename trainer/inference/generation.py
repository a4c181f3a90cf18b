"""Text from a model, token by token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import BaseStreamer, StoppingCriteria

from configs.errors import InputError
from trainer.inference.decoding import Decoding
from trainer.tasks.task import Opening, WritingTask

OnText = Callable[[str], None]


@dataclass(frozen=True)
class Drawn:
    """A text that a model has written after an opening.

    Attributes:
        ids: its tokens, without the one that ends it.
        text: as it reads, without the opening, and before a stop string.
        ended: whether the model ended it; else it had no more room.
    """

    ids: tuple[int, ...]
    text: str
    ended: bool


def generate(
    model: Any, task: WritingTask, tokenizer: Any, prompt: str, decoding: Decoding, on_text: OnText = lambda _: None
) -> str:
    """Has a model write, and hands each piece of text on as soon as it is complete.

    Args:
        model: that writes.
        task: what the prompt is to it: the start of a text, or what it answers.
        tokenizer: the model's.
        prompt: what is written first.
        decoding: how tokens are chosen.
        on_text: receives the text piece by piece, the prompt first.

    Returns:
        The whole text: an answer stands on lines of its own below the prompt.

    Raises:
        InputError: as ``write``.
    """
    opening = task.opening(prompt)
    before = prompt if opening.continued else f"{prompt}\n"
    on_text(before)
    return before + write(model, tokenizer, opening, task.context_length, decoding, on_text)


def write(
    model: Any,
    tokenizer: Any,
    opening: Opening,
    context_length: int,
    decoding: Decoding,
    on_text: OnText = lambda _: None,
) -> str:
    """What a model writes after an opening, without that.

    A beam search hands on all of its text at the end: until then no beginning is the best one for sure.

    Raises:
        InputError: the opening fills the context, or a recurrent model is to search with beams.
    """
    if decoding.beams > 1 and getattr(model, "_is_stateful", False):
        raise InputError("beams: a recurrent model's state does not follow them; give 1 beam")
    room, read = room_of(model, opening, context_length), _read(model, opening)
    written = _Written(tokenizer.backend_tokenizer, opening, decoding.stop)
    pieces = list[str]()

    def further(token: int) -> None:
        _hand_on("" if token in opening.ends else written.text(token), pieces, on_text)

    stopping = _Stopping(tokenizer.backend_tokenizer, opening, decoding.stop, read)
    streamer = None if decoding.beams > 1 else _Streamer(further)
    (found,) = _generated(model, opening, decoding, room, stopping, streamer)
    for token in found[read:] if decoding.beams > 1 else ():
        further(token)
    _hand_on(written.rest(), pieces, on_text)
    return "".join(pieces)


def draw(
    model: Any, tokenizer: Any, opening: Opening, context_length: int, decoding: Decoding, rows: int
) -> list[Drawn]:
    """Several texts after one opening, drawn together.

    Args:
        model: that writes.
        tokenizer: the model's.
        opening: what it reads first, each time.
        context_length: of the model.
        decoding: how tokens are chosen; its seed is that of all rows together.
        rows: how many texts.

    Raises:
        InputError: the opening fills the context.
    """
    read = _read(model, opening)
    stopping = _Stopping(tokenizer.backend_tokenizer, opening, decoding.stop, read)
    found = _generated(model, opening, decoding, room_of(model, opening, context_length), stopping, None, rows)
    return [_drawn(tokenizer.backend_tokenizer, opening, decoding.stop, row[read:]) for row in found]


def _drawn(backend: Any, opening: Opening, stop: Sequence[str], tokens: list[int]) -> Drawn:
    end = next((place for place, token in enumerate(tokens) if token in opening.ends), len(tokens))
    # A row that has met a stop string before the others is filled up with ends.
    written = _Written(backend, opening, stop)
    stopped = written.stopped_by(tokens[:end])
    return Drawn(tuple(tokens[:end]), written.rest(), end < len(tokens) or stopped)


def room_of(model: Any, opening: Opening, context_length: int) -> int:
    """Most tokens that a model can write after an opening.

    Raises:
        InputError: none, since the opening fills the context.
    """
    room = context_length - (0 if model.config.is_encoder_decoder else len(opening.ids))
    if room < 1:
        raise InputError(
            f"the prompt has {len(opening.ids):,} tokens, and the model's context is {context_length:,}; give a "
            "shorter one"
        )
    return room


def _read(model: Any, opening: Opening) -> int:
    """How many of the tokens that transformers gives back are what was read, or what a decoder starts with."""
    return 1 if model.config.is_encoder_decoder else len(opening.ids)


def _hand_on(piece: str, pieces: list[str], on_text: OnText) -> None:
    if piece:
        pieces.append(piece)
        on_text(piece)


def _generated(
    model: Any, opening: Opening, decoding: Decoding, room: int, stopping: "_Stopping", streamer: Any, rows: int = 1
) -> list[list[int]]:
    ids = torch.tensor([opening.ids] * rows)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(decoding.seed)
        found = model.generate(
            input_ids=ids,  # by its name: peft's encoder-decoders take no other
            attention_mask=torch.ones_like(ids),
            eos_token_id=list(opening.ends),
            pad_token_id=opening.ends[0],
            stopping_criteria=[stopping] if decoding.stop else None,
            streamer=streamer,
            **{**decoding.arguments, "max_new_tokens": min(decoding.max_new_tokens, room)},
        )
    tokens: list[list[int]] = found.tolist()
    return tokens


class _Written:
    """Tokens back to text, a whole character at a time, as they read behind all tokens before them.

    transformers' TextStreamer reads each line by itself, where a SentencePiece model loses a blank of its indentation;
    tokenizers' DecodeStream raises where bytes are no character.
    """

    def __init__(self, backend: Any, opening: Opening, stop: Sequence[str] = ()) -> None:
        self._backend, self._ids = backend, list(opening.ids if opening.continued else ())
        self._stop = stop
        self._start = self._shown = len(self._whole())

    def _whole(self) -> str:
        """All of the text, but for a character of which bytes are still to come."""
        text: str = self._backend.decode(self._ids, skip_special_tokens=True)
        return text.rstrip("\N{REPLACEMENT CHARACTER}")

    def text(self, token: int) -> str:
        """What is whole with this token and was not before; what may be the start of a stop string is held back."""
        self._ids.append(token)
        whole = self._whole()
        ended = first_stop(whole, self._stop, self._start)
        return self._new(whole, len(whole) - _held_back(whole[self._start :], self._stop) if ended < 0 else ended)

    def rest(self) -> str:
        """What was held back and has become no stop string."""
        whole = self._whole()
        ended = first_stop(whole, self._stop, self._start)
        return self._new(whole, len(whole) if ended < 0 else ended)

    def stopped_by(self, tokens: Sequence[int]) -> bool:
        """Whether the text holds a stop string once it goes on with these."""
        self._ids += tokens
        return first_stop(self._whole(), self._stop, self._start) >= 0

    def _new(self, whole: str, end: int) -> str:
        new, self._shown = whole[self._shown : end], max(self._shown, end)
        return new


def first_stop(text: str, stop: Sequence[str], start: int = 0) -> int:
    """Where the first stop string begins in a text, from a place on; -1: there is none."""
    return min((place for one in stop if (place := text.find(one, start)) >= 0), default=-1)


def _held_back(text: str, stop: Sequence[str]) -> int:
    """How many characters at a text's end are the beginning of a stop string."""
    longest = max(map(len, stop), default=1) - 1
    return next(
        (size for size in range(min(longest, len(text)), 0, -1) if any(one.startswith(text[-size:]) for one in stop)), 0
    )


class _Stopping(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    """Ends a text that holds a stop string.

    transformers' own StopStringCriteria compares tokens one by one, and never sees a letter whose bytes are several.
    """

    def __init__(self, backend: Any, opening: Opening, stop: Sequence[str], read: int) -> None:
        self._backend, self._opening, self._stop, self.read = backend, opening, stop, read

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        ended = [self._holds(row[self.read :]) for row in input_ids.tolist()]
        return torch.tensor(ended, device=input_ids.device)

    def _holds(self, tokens: Sequence[int]) -> bool:
        return _Written(self._backend, self._opening, self._stop).stopped_by(tokens)


class _Streamer(BaseStreamer):  # type: ignore[misc]  # transformers is not typed
    """Hands on every token that a model writes; what it is given first is what it was asked."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token, self._begun = on_token, False

    def put(self, value: Any) -> None:
        for token in value.flatten().tolist() if self._begun else ():
            self._on_token(token)
        self._begun = True

    def end(self) -> None:
        """What no whole character has come of is none."""
