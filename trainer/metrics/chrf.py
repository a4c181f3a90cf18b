"""How much two texts have in common, by runs of characters: chrF of one answer, without any library."""

from collections import Counter
from statistics import fmean

_ORDERS = range(1, 7)  # characters of a run
_BETA_SQUARED = 4.0  # what is missing weighs twice as much as what is too much


def chrf(prediction: str, reference: str) -> float:
    """F-score of the runs of up to six characters, white space aside (Popović, 2015): 0 to 1.

    As sacrebleu's ``sentence_chrf`` has it: lengths that one of the texts is too short for don't count, and without any
    character there is nothing in common.
    """
    pairs = [(_runs(prediction, order), _runs(reference, order)) for order in _ORDERS]
    common = [((found & wanted).total(), found.total(), wanted.total()) for found, wanted in pairs if found and wanted]
    precision = fmean([both / found for both, found, _ in common] or [0.0])
    recall = fmean([both / wanted for both, _, wanted in common] or [0.0])
    if not precision + recall:
        return 0.0
    return (1 + _BETA_SQUARED) * precision * recall / (_BETA_SQUARED * precision + recall)


def _runs(text: str, order: int) -> Counter[str]:
    characters = "".join(text.split())
    return Counter(characters[start : start + order] for start in range(len(characters) - order + 1))
