"""Words of a text in languages for which the rules that were made for English don't hold."""

import regex

_PUNCTUATION = regex.compile(r"[\p{P}$+<=>^`|~]")
_HAN = regex.compile(r"\p{Han}")


def words(text: str) -> list[str]:
    """What stands between blanks, in lower case and without punctuation; each Chinese character is a word of its own.

    The rule of MLQA's "mixed segmentation" (Lewis et al., 2020), without its lists of articles.
    """
    bare: str = _PUNCTUATION.sub("", text.lower())
    spaced: str = _HAN.sub(r" \g<0> ", bare)
    return spaced.split()
