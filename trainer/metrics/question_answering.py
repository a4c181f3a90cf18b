"""How well questions are answered: exact match and token F1 as SQuAD v1.1 has them (Rajpurkar et al., 2016).

In other languages than English as MLQA has them (Lewis et al., 2020).
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from trainer.metrics.inputs import check_pairs, check_references, primary_language
from trainer.metrics.scores import Indices, Scores
from trainer.metrics.words import without_punctuation, words

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = {
    "en": re.compile(r"\b(a|an|the)\b"),
    "de": re.compile(r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b"),
    "es": re.compile(r"\b(un|una|unos|unas|el|la|los|las)\b"),
    "vi": re.compile(r"\b(của|là|cái|chiếc|những)\b"),
    "ar": re.compile("ال"),  # wherever it stands, as MLQA's script has it
}


def scores(predictions: Sequence[str], references: Sequence[Sequence[str]], language: str = "en") -> Scores:
    """Exact match and F1 over words, each against the reference that is nearest.

    English answers are compared by SQuAD's own rule: in lower case, without ASCII punctuation and articles. Others by
    MLQA's: without any of Unicode's punctuation, and without the articles of German, Spanish, Vietnamese and Arabic;
    no other language loses a word. Words are those of ``words``.

    Args:
        predictions: an answer to each question.
        references: the right answers to each question.
        language: of the answers, as an ISO 639 code.

    Raises:
        InputError: numbers of questions differ, or there are none; a question has no right answer, or a text in place
            of a list; the language is no code.
    """
    check_pairs(predictions, references)
    check_references(references)
    values_N2 = np.array(
        [
            (exact_match(prediction, accepted, language), token_f1(prediction, accepted, language))
            for prediction, accepted in zip(predictions, references, strict=True)
        ]
    )

    def figures(drawn: Indices) -> dict[str, float]:
        return dict(zip(("exact_match", "f1"), values_N2[drawn].mean(axis=0).tolist(), strict=True))

    return Scores(len(values_N2), figures)


def exact_match(prediction: str, references: Sequence[str], language: str = "en") -> float:
    """1 if the answer has the words of a reference in their order, else 0."""
    return float(_words(prediction, language) in [_words(reference, language) for reference in references])


def token_f1(prediction: str, references: Sequence[str], language: str = "en") -> float:
    """The largest F1 of the answer's words and a reference's."""
    found = _words(prediction, language)
    return max(_f1(found, _words(reference, language)) for reference in references)


def _f1(found: list[str], wanted: list[str]) -> float:
    """F1 of two bags of words; two empty ones are equal, as in SQuAD v2.0 (v1.1 has 0)."""
    if not found and not wanted:
        return 1.0
    return 2 * (Counter(found) & Counter(wanted)).total() / (len(found) + len(wanted))


def _words(text: str, language: str) -> list[str]:
    known = primary_language(language)
    if known == "en":
        return _ARTICLES[known].sub(" ", text.lower().translate(_PUNCTUATION)).split()
    bare = without_punctuation(text.lower())
    return words(_ARTICLES[known].sub(" ", bare) if known in _ARTICLES else bare)
