"""Text from a model, token by token."""

from collections.abc import Callable
from typing import Any

import torch

from trainer.data.tokenizer import first_token, special_tokens

_WRITES_NOTHING = "This base model is an encoder: it fills in words that are masked, and writes no text."


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    on_text: Callable[[str], None],
) -> str:
    """Samples a continuation and hands each piece of text on as soon as it is complete.

    An encoder-decoder reads the prompt, and after it the sentinel of a span where its tokenizer has one: what it writes
    is the span. An encoder writes nothing, and the text says so.

    Args:
        model: a decoder, an encoder-decoder or a recurrent model; or an encoder.
        tokenizer: its tokenizer.
        prompt: how the text starts.
        max_new_tokens: tokens to sample.
        temperature: softmax temperature.
        seed: seed of the sampling.
        on_text: receives the text piece by piece, the prompt first.

    Returns:
        The whole text.
    """
    if not model.can_generate():
        on_text(_WRITES_NOTHING)
        return _WRITES_NOTHING
    from transformers import TextStreamer

    pieces: list[str] = []

    class Streamer(TextStreamer):  # type: ignore[misc]
        """Passes finished text on instead of printing it."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
            pieces.append(text)
            on_text(text)

    ids = torch.tensor([_asked(model, tokenizer, prompt)])
    if model.config.is_encoder_decoder:  # which writes what follows, and does not repeat the prompt
        pieces.append(prompt)
        on_text(prompt)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=temperature,
            top_p=0.95,
            use_cache=True,
            pad_token_id=tokenizer.eos_token_id,
            streamer=Streamer(tokenizer, skip_special_tokens=True),
        )
    return "".join(pieces)


def _asked(model: Any, tokenizer: Any, prompt: str) -> list[int]:
    """The tokens that a model is given for it to go on."""
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    if not model.config.is_encoder_decoder:
        return [first_token(tokenizer), *ids]
    sentinel = tokenizer.get_vocab().get(special_tokens("span_corruption", 1)[1])
    return [*ids, *([] if sentinel is None else [sentinel]), tokenizer.eos_token_id]
