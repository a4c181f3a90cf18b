"""How well a language model predicts records: perplexity, and bits per character, which no tokenizer changes."""

import math
from collections.abc import Sequence

import numpy as np

from configs.errors import InputError
from trainer.metrics.bits_per_char import Score
from trainer.metrics.inputs import check_pairs
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
    check_pairs(tokens, characters)
    if len(nats) != len(tokens):
        raise InputError(f"nats of {len(nats)} records, tokens of {len(tokens)}; give one for each")
    if min(*tokens, *characters) < 1:
        raise InputError("a record has no token or no character; leave it out")
    table_N3 = np.array([nats, tokens, characters], np.float64).T

    def figures(drawn: Indices) -> dict[str, float]:
        total, predicted, covered = table_N3[drawn].sum(axis=0).tolist()
        bits = Score(total, int(covered), len(drawn)).bits_per_char
        return {
            "perplexity": _exp(total / predicted),
            "bits_per_char": math.nan if bits is None else bits,
        }

    return Scores(len(table_N3), figures)


def _exp(value: float) -> float:
    """The exponential, or nan where it is too large for a number: a model that has diverged has no figure."""
    return math.exp(value) if value < math.log(np.finfo(np.float64).max) else math.nan
