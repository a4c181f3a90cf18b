"""The next token of one request, by transformers' own processors and a stream of randomness of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen, and when they end.

    Attributes:
        max_new_tokens: most tokens.
        temperature: of the softmax; 0 takes the likeliest token.
        top_k: how many of the likeliest tokens are drawn from; 0: all.
        top_p: least probability that the likeliest tokens drawn from have together.
        repetition_penalty: divides what is said of tokens that were there before (Keskar et al. 2019).
        seed: of the draws.
        stop: texts before which the answer ends.
        ends: tokens that end it.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()


class Chooser:
    """Chooses one request's tokens: a function of its own logits, tokens and seed alone."""

    def __init__(self, sampling: Sampling, ids: Sequence[int], device: torch.device) -> None:
        self._ids = list(ids)
        self._draws = sampling.temperature > 0
        self._processors = _processors(sampling)
        self._generator = torch.Generator(device).manual_seed(sampling.seed)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is taken, whatever came before."""
        return not self._draws and not self._processors

    def token(self, logits_V: torch.Tensor) -> int:
        """The next token."""
        scores_1V = logits_V.float()[None]
        if self._processors:
            ids = torch.tensor([self._ids], device=logits_V.device)
            for processor in self._processors:
                scores_1V = processor(ids, scores_1V)
        if self._draws:
            drawn = torch.multinomial(scores_1V.softmax(dim=-1), 1, generator=self._generator)
        else:
            drawn = scores_1V.argmax(dim=-1)
        token = int(drawn)
        self._ids.append(token)
        return token


def _processors(sampling: Sampling) -> list[Any]:
    """In the order of transformers' own generate."""
    from transformers.generation import logits_process as of

    found: list[Any] = []
    if sampling.repetition_penalty != 1:
        found.append(of.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature > 0:
        if sampling.temperature != 1:
            found.append(of.TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            found.append(of.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            found.append(of.TopPLogitsWarper(sampling.top_p))
    return found
