"""Text from a model, token by token."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.generation import BaseStreamer

from trainer.tasks.task import Opening, WritingTask


def generate(
    model: Any,
    task: WritingTask,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    on_text: Callable[[str], None],
) -> str:
    """Samples what a model writes and hands each piece of text on as soon as it is complete.

    Args:
        model: that writes.
        task: what the prompt is to it: the start of a text, or what it answers.
        tokenizer: the model's.
        prompt: what is written first.
        max_new_tokens: tokens to sample.
        temperature: softmax temperature.
        seed: seed of the sampling.
        on_text: receives the text piece by piece, the prompt first.

    Returns:
        The whole text: an answer stands on lines of its own below the prompt.
    """
    opening = task.opening(prompt)
    pieces = [prompt if opening.continued else f"{prompt}\n"]
    on_text(pieces[0])
    written = _Written(tokenizer.backend_tokenizer, opening)

    def further(token: int) -> None:
        if piece := written.text(token):
            pieces.append(piece)
            on_text(piece)

    ids = torch.tensor([opening.ids])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model.generate(
            input_ids=ids,  # by its name: peft's encoder-decoders take no other
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=temperature,
            top_p=0.95,
            use_cache=True,
            eos_token_id=list(opening.ends),
            pad_token_id=opening.ends[0],
            streamer=_Streamer(further),
        )
    return "".join(pieces)


class _Written:
    """Tokens back to text, a whole character at a time, as they read behind all tokens before them.

    transformers' TextStreamer reads each line by itself, where a SentencePiece model loses a blank of its indentation;
    tokenizers' DecodeStream raises where bytes are no character.
    """

    def __init__(self, backend: Any, opening: Opening) -> None:
        self._backend, self._ids = backend, list(opening.ids if opening.continued else ())
        self._shown = len(self._whole())

    def _whole(self) -> str:
        """All of the text, but for a character of which bytes are still to come."""
        text: str = self._backend.decode(self._ids, skip_special_tokens=True)
        return text.rstrip("\N{REPLACEMENT CHARACTER}")

    def text(self, token: int) -> str:
        """What is whole with this token and was not before."""
        self._ids.append(token)
        whole = self._whole()
        new, self._shown = whole[self._shown :], max(self._shown, len(whole))
        return new


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
