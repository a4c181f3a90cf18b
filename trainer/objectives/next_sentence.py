"""Masked words, and whether a text goes on with another one (Devlin et al. 2019, task 2)."""

from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.order import Int64s
from trainer.data.packing import Windows
from trainer.data.tokenizer import load_tokenizer
from trainer.objectives.masked import Words
from trainer.objectives.pieces import IGNORED, Examples, chance, nats, not_padding, num_targets, padded

_GOES_ON, _DOES_NOT = 0, 1  # as transformers names them
_END = 0


class NextSentence:
    """Two texts between end-of-text tokens: half the time the second one goes on where the first one stops.

    Args:
        tokenizer: directory of the corpus' tokenizer.
        seed: the run's.
    """

    terms = 2

    def __init__(self, tokenizer: Path, seed: int) -> None:
        self._words, self._seed = Words(load_tokenizer(tokenizer)), seed

    def examples(self, windows: Windows) -> Examples:
        """A pair for each window, from the longest piece of a document in it."""
        seen, targets, kinds, answers = [], [], [], []
        for row in range(len(windows.tokens)):
            generator = chance(self._seed, windows, row)
            first, second, answer = _pair(windows, row, generator)
            ids = np.concatenate([[_END], first, [_END], second, [_END]])
            hidden, wanted = self._words.hide(ids, generator)
            seen.append(hidden)
            targets.append(wanted)
            kinds.append((np.arange(len(ids)) > len(first) + 1).astype(np.int64))
            answers.append(answer)
        targets_BT = padded(targets, IGNORED)
        inputs = {
            "input_ids": padded(seen, 0),
            "token_type_ids": padded(kinds, 0),
            **not_padding(seen),
            "targets": targets_BT,
            "answers": np.array(answers)[:, None],
        }
        return Examples(inputs, [num_targets(targets_BT), len(answers)])

    def sums(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Nats of all hidden tokens, and of all answers, shape (2,)."""
        import torch

        given = {name: value for name, value in inputs.items() if name not in ("targets", "answers")}
        output = model(**given)
        answers = nats(output.seq_relationship_logits[:, None], inputs["answers"])
        return torch.stack([nats(output.prediction_logits, inputs["targets"]), answers])


def _pair(windows: Windows, row: int, generator: np.random.Generator) -> tuple[Int64s, Int64s, int]:
    """Two texts that fill a window with the three tokens around them, and whether the second is another one's."""
    longest = windows.tokens.shape[1] - 3
    text = _longest_piece(windows, row)[:longest]
    cut = int(generator.integers(1, max(2, len(text))))
    if generator.random() < 0.5:
        return text[:cut], text[cut:], _GOES_ON
    other = _longest_piece(windows.another(row, generator), 0)
    start = int(generator.integers(max(1, len(other) - (longest - cut) + 1)))
    return text[:cut], other[start : start + longest - cut], _DOES_NOT


def _longest_piece(windows: Windows, row: int) -> Int64s:
    """The longest run of one document's tokens, without end-of-text."""
    tokens_T = windows.tokens[row]
    starts = tokens_T == _END
    if windows.positions is not None:
        starts = starts | (windows.positions[row] == 0)
    pieces = np.split(tokens_T, np.flatnonzero(starts))
    pieces = [piece[piece != _END] for piece in pieces]
    return max(pieces, key=len)
