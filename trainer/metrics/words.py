"""Words of a text in languages for which the rules that were made for English don't hold."""

import regex

from trainer.data.cleaning import UNSPACED

_PUNCTUATION = regex.compile(r"[\p{P}$+<=>^`|~]")
_UNSPACED_WORD = regex.compile(UNSPACED + r"\p{M}*")


def without_punctuation(text: str) -> str:
    """The text without Unicode's punctuation and ASCII's."""
    bare: str = _PUNCTUATION.sub("", text)
    return bare


def words(text: str) -> list[str]:
    """What stands between blanks, in lower case and without punctuation.

    Where a script has no blanks between words, as Chinese, each character is a word. For Chinese this is the "mixed
    segmentation" of MLQA (Lewis et al., 2020).
    """
    spaced: str = _UNSPACED_WORD.sub(r" \g<0> ", without_punctuation(text.lower()))
    return spaced.split()
