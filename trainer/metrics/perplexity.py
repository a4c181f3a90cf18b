"""How well a language model predicts records: perplexity, and bits per character, which no tokenizer changes."""

import math
from collections.abc import Sequence

import numpy as np

from configs.errors import InputError
from trainer.metrics.scores import Indices, Scores


def scores(nats: Sequence[float], tokens: Sequence[int], characters: Sequence[int]) -> Scores:
    """Perplexity by token and bits per character of all records together; nan where a loss is not finite.

    Args:
        nats: negative log-likelihood of each record.
        tokens: number of its tokens that were predicted.
        characters: number of its characters that these cover.

    Raises:
        InputError: numbers of records differ, there are none, or one of no tokens or characters.
    """
    if not len(nats) == len(tokens) == len(characters):
        found = f"{len(nats)} nats, {len(tokens)} tokens and {len(characters)} characters"
        raise InputError(f"{found}; give one of each for each record")
    if not len(nats):
        raise InputError("no records; give at least one")
    if min(*tokens, *characters) < 1:
        raise InputError("a record has no token or no character; leave it out")
    table_N3 = np.array([nats, tokens, characters], np.float64).T

    def figures(drawn: Indices) -> dict[str, float]:
        total, predicted, covered = table_N3[drawn].sum(axis=0).tolist()
        bits = total / covered / math.log(2)
        return {
            "perplexity": _exp(total / predicted),
            "bits_per_char": bits if math.isfinite(bits) else math.nan,
        }

    return Scores(len(table_N3), figures)


def _exp(value: float) -> float:
    """The exponential, or nan where it is too large for a number: a model that has diverged has no figure."""
    return math.exp(value) if value < math.log(np.finfo(np.float64).max) else math.nan
