"""The masked objective: nats of words that were hidden from the model (Devlin et al. 2019, whole words)."""

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.order import Int64s
from trainer.data.packing import Windows
from trainer.data.tokenizer import load_tokenizer
from trainer.objectives.pieces import IGNORED, Examples, chance, nats, not_padding, num_targets, padded, sequences

SHARE, HIDDEN, REPLACED = 0.15, 0.8, 0.1  # of the tokens; of these, hidden, and replaced by any token
_LONGEST_WORD = 10  # a longer run without a space, as Chinese has them, is no word: each of its tokens is one
_SPACE, _LETTER, _NUMBER, _OTHER = range(4)


class Words:
    """Where words begin, by their tokens.

    Byte-level BPE cuts a text between characters of different kinds before it makes tokens, and leaves a space with the
    word that follows it. So a token goes on with the word of the one before it where that is a single space, or ends
    with the kind of character that this one begins with, other than space.

    Args:
        tokenizer: of the corpus.
    """

    def __init__(self, tokenizer: Any) -> None:
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        texts = [tokenizer.backend_tokenizer.decoder.decode([token]) for token in tokens]
        self._first = np.array([_kind(text[:1]) for text in texts])
        self._last = np.array([_kind(text[-1:]) for text in texts])
        self._blank = np.array([text == " " for text in texts])
        self.num_special = len(tokenizer.all_special_ids)
        self.mask, self.vocab_size = int(tokenizer.mask_token_id), len(texts)

    def of(self, ids_T: Int64s) -> list[Int64s]:
        """The places of each word's tokens. Special tokens are in no word."""
        first, last = self._first[ids_T], self._last[ids_T]
        begins = np.ones(len(ids_T), dtype=bool)
        begins[1:] = (first[1:] == _SPACE) | ((first[1:] != last[:-1]) & ~self._blank[ids_T[:-1]])
        special = ids_T < self.num_special
        begins |= special
        begins[1:] |= special[:-1]
        found = []
        for word in np.split(np.arange(len(ids_T)), np.flatnonzero(begins)[1:]):
            if not special[word[0]]:
                found += [word] if len(word) <= _LONGEST_WORD else np.split(word, len(word))
        return found

    def hide(self, ids_T: Int64s, generator: np.random.Generator) -> tuple[Int64s, Int64s]:
        """Hides 15% of the tokens in whole words; one word at least.

        Returns:
            What the model sees, and the targets.
        """
        seen, targets, chosen = ids_T.copy(), np.full_like(ids_T, IGNORED), self._choose(ids_T, generator)
        targets[chosen] = ids_T[chosen]
        fate = generator.random(len(chosen))
        anything = generator.integers(self.num_special, self.vocab_size, size=len(chosen))
        kept = np.where(fate < HIDDEN + REPLACED, anything, ids_T[chosen])
        seen[chosen] = np.where(fate < HIDDEN, self.mask, kept)
        return seen, targets

    def _choose(self, ids_T: Int64s, generator: np.random.Generator) -> Int64s:
        words = self.of(ids_T)
        most, chosen = max(1, round(SHARE * sum(map(len, words)))), np.zeros(0, dtype=np.int64)
        for number in generator.permutation(len(words)):
            word = words[number]
            if not len(chosen) or len(chosen) + len(word) <= most:
                chosen = np.append(chosen, word)
        return chosen


class Masked:
    """Predicts hidden words from what stands on both sides of them.

    Args:
        tokenizer: directory of the corpus' tokenizer.
        seed: the run's.
    """

    terms = 1

    def __init__(self, tokenizer: Path, seed: int) -> None:
        self._words, self._seed = Words(load_tokenizer(tokenizer)), seed

    def examples(self, windows: Windows) -> Examples:
        """A sequence for each window, or for each piece of a document."""
        seen, targets = [], []
        for row in range(len(windows.tokens)):
            generator = chance(self._seed, windows, row)
            for ids in sequences(windows, row):
                hidden, wanted = self._words.hide(ids, generator)
                seen.append(hidden)
                targets.append(wanted)
        targets_BT = padded(targets, IGNORED)
        inputs = {"input_ids": padded(seen, 0), **not_padding(seen), "targets": targets_BT}
        return Examples(inputs, [num_targets(targets_BT)])

    def sums(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Nats of all hidden tokens, shape (1,)."""
        given = {name: value for name, value in inputs.items() if name != "targets"}
        return nats(model(**given).logits, inputs["targets"])[None]


def _kind(character: str) -> int:
    """As GPT-2's rule for cutting texts tells characters apart; parts of one are letters, as most of them are."""
    if character.isspace():
        return _SPACE
    category = unicodedata.category(character)[0] if character and character != "\N{REPLACEMENT CHARACTER}" else "L"
    return {"L": _LETTER, "M": _LETTER, "N": _NUMBER}.get(category, _OTHER)
