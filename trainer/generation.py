"""Text from a model, token by token."""

from collections.abc import Callable
from typing import Any

import torch

from trainer.tasks.task import WritingTask


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
    from transformers import TextStreamer

    pieces: list[str] = []

    class Streamer(TextStreamer):  # type: ignore[misc]
        """Passes finished text on instead of printing it."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
            pieces.append(text)
            on_text(text)

    opening = task.opening(prompt)
    streamer = Streamer(tokenizer, skip_prompt=not opening.continued, skip_special_tokens=True)
    if not opening.continued:
        streamer.on_finalized_text(f"{prompt}\n")
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
            streamer=streamer,
        )
    return "".join(pieces)
