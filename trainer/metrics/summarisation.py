"""How much of a reference summary is found again: ROUGE by rouge-score."""

from collections.abc import Sequence

import numpy as np

from trainer.metrics.inputs import check_pairs, check_references, library, primary_language
from trainer.metrics.scores import Indices, Scores
from trainer.metrics.words import words

_TYPES = ("rouge1", "rouge2", "rougeL")


class _Words:
    """The tokenizer that rouge-score is given: its own drops every letter that English does not have."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def scores(predictions: Sequence[str], references: Sequence[Sequence[str]], language: str = "en") -> Scores:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L, each against the reference that is nearest.

    English words are stemmed (Porter). In other languages they are those of ``words``.

    Args:
        predictions: a summary of each text.
        references: right summaries of each text.
        language: of the summaries, as an ISO 639 code.

    Raises:
        InputError: numbers of texts differ, or there are none; a text has no right summary, or a text in place of a
            list; the language is no code; rouge-score is not installed.
    """
    check_pairs(predictions, references)
    check_references(references)
    own = None if primary_language(language) == "en" else _Words()
    scorer = library("rouge_score.rouge_scorer").RougeScorer(_TYPES, use_stemmer=True, tokenizer=own)
    found = [scorer.score_multi(accepted, mine) for mine, accepted in zip(predictions, references, strict=True)]
    values_N3 = np.array([[score[name].fmeasure for name in _TYPES] for score in found])

    def figures(drawn: Indices) -> dict[str, float]:
        return dict(zip(_TYPES, values_N3[drawn].mean(axis=0).tolist(), strict=True))

    return Scores(len(values_N3), figures)
