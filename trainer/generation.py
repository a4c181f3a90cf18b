"""Text from a model, token by token."""

from collections.abc import Callable
from typing import Any

import torch

from trainer.data.tokenizer import first_token


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

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompt: how the text starts.
        max_new_tokens: tokens to sample.
        temperature: softmax temperature.
        seed: seed of the sampling.
        on_text: receives the text piece by piece, the prompt first.

    Returns:
        The whole text.
    """
    from transformers import TextStreamer

    pieces: list[str] = []

    class Streamer(TextStreamer):  # type: ignore[misc]
        """Passes finished text on instead of printing it."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
            pieces.append(text)
            on_text(text)

    ids = torch.tensor([[first_token(tokenizer), *tokenizer.encode(prompt, add_special_tokens=False)]])
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
