"""What a tokenizer takes from texts, tried on a few words of several languages."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

SAMPLES = {
    "English": "Ada's ship didn't sail at 7:30; she waited, read “Emma” and wrote.",
    "German": "Über Nacht fiel Schnee, und die Straße nach Köln war am Morgen weiß.",
    "Spanish": "¿Cuándo llegará el niño? Mañana, dijo la señora; aquí habrá música.",
    "Chinese": "护士七点送来热茶、然后打开窗户。\u3000病人说“今天好多了”。",
    "Hindi": "नर्स ने सुबह खिड़की खोली; क़लम और पढ़ाई ज़रूरी हैं। क्\u200dष",
    "Arabic": "فَتَحَتِ الممرّضةُ النافذةَ عند الساعة ٣، ثمّ قالت: صباح الخير؟",
    "code": "def mean(values):\n\tif not values:\n        return {'n' : 0}  # empty\n\n\n    return sum(values)\n",
    "emoji": "👩🏽\u200d⚕️ 👨\u200d👩\u200d👧 🇩🇪 ☕️ 🙏🏿",
}
"""Right-to-left writing, combining marks, a script without blanks, code with tabs, signs of several code points."""
_ALIKE = {
    "case": ("Ada Lovelace", "ada lovelace"),
    "accents": ("año résumé", "ano resume"),
    "vowel signs": ("ने", "न"),
    "line ends and indentation": ("if a:\n    b", "if a: b"),
}


def count_unknown(tokenizer: Any, ids: Sequence[int]) -> tuple[int, int]:
    """How many of a text's tokens stand for what the tokenizer doesn't know, and how many there are."""
    unknown = _unknown_token(tokenizer)
    return (0 if unknown is None else ids.count(unknown)), len(ids)


@lru_cache(maxsize=4)  # asked for each record
def _unknown_token(tokenizer: Any) -> int | None:
    unknown: int | None = tokenizer.unk_token_id
    # GPT-2's tokenizer calls its end-of-text unknown as well, and knows every byte.
    return None if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id) else unknown


def losses(tokenizer: Any) -> list[str]:
    """What a model with this tokenizer can't tell apart, a line each; none where every byte is read."""

    def read(text: str) -> list[int]:
        ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def knows(text: str) -> bool:
        return count_unknown(tokenizer, read(text))[0] == 0

    alike = [what for what, (one, other) in _ALIKE.items() if read(one) == read(other) and knows(one)]
    counts = {language: count_unknown(tokenizer, read(text)) for language, text in SAMPLES.items()}
    shares = [f"{language} {count / of:.0%}" for language, (count, of) in counts.items() if count]
    lines = []
    if alike:
        lines.append(f"the model's tokenizer can't tell texts apart that differ in {', '.join(alike)} alone")
    if shares:
        lines.append(f"the model's tokenizer doesn't know these shares of a sample's tokens: {', '.join(shares)}")
    return lines
