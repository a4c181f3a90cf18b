"""How near translations are to a reference: BLEU and chrF by sacrebleu."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from configs.errors import InputError
from trainer.metrics.inputs import check_pairs, check_references, library, primary_language
from trainer.metrics.scores import Indices, Scores

_TOKENIZERS = ("13a", "zh", "intl", "char", "none")  # those that need no further package and no download


def scores(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    language: str = "en",
    tokenizer: str | None = None,
) -> Scores:
    """Corpus BLEU and chrF, from 0 to 1 (other programs give them times 100).

    BLEU is 0 where no prediction has four tokens, even where all of them are right.

    Args:
        predictions: a translation of each text.
        references: right translations of each text.
        language: of the translations, as an ISO 639 code.
        tokenizer: sacrebleu's, for BLEU; by default "zh" for Chinese and "13a" for any other language.

    Raises:
        InputError: numbers of texts differ, or there are none; a text has no right translation, or a text in place of
            a list; the language is no code; there is no such tokenizer; sacrebleu is not installed.
    """
    check_pairs(predictions, references)
    check_references(references)
    chosen = tokenizer or ("zh" if primary_language(language) == "zh" else "13a")
    if chosen not in _TOKENIZERS:
        raise InputError(f"tokenizer {chosen!r}: give one of {', '.join(_TOKENIZERS)}")
    metrics = library("sacrebleu.metrics")
    parts = {
        name: (metric, _statistics(metric, predictions, references))
        for name, metric in {"bleu": metrics.BLEU(tokenize=chosen, force=True), "chrf": metrics.CHRF()}.items()
    }

    def figures(drawn: Indices) -> dict[str, float]:
        return {
            name: metric._compute_score_from_stats(statistics[drawn].sum(axis=0).tolist()).score / 100
            for name, (metric, statistics) in parts.items()
        }

    return Scores(len(predictions), figures)


def _statistics(metric: Any, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Indices:
    """What each text adds to the sums that the metric is made of. sacrebleu shares it with its own bootstrap alone."""
    return np.array(metric._extract_corpus_statistics(predictions, list(zip_longest(*references))), np.intp)
