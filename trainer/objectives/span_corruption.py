"""Span corruption: nats of the spans that were cut out of a text (Raffel et al. 2020, section 3.3.4)."""

from typing import Any

import numpy as np

from trainer.data.order import Int64s
from trainer.data.packing import Windows
from trainer.data.tokenizer import num_noise, num_spans
from trainer.objectives.pieces import IGNORED, Examples, chance, nats, not_padding, num_targets, padded, sequences

_END, _FIRST_SENTINEL = 0, 1


class SpanCorruption:
    """The encoder sees a text with a sentinel for each span of it; the decoder writes each sentinel and its span.

    Args:
        seed: the run's.
    """

    terms = 1

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def examples(self, windows: Windows) -> Examples:
        """A pair of sequences for each window, or for each piece of a document."""
        seen, targets = [], []
        for row in range(len(windows.tokens)):
            generator = chance(self._seed, windows, row)
            for ids in sequences(windows, row):
                left, cut = corrupt(ids, generator)
                seen.append(left)
                targets.append(cut)
        before = [np.concatenate([[_END], cut[:-1]]) for cut in targets]  # the decoder starts with end-of-text
        targets_BT = padded(targets, IGNORED)
        inputs = {
            "input_ids": padded(seen, 0),
            **not_padding(seen),
            "decoder_input_ids": padded(before, 0),
            "targets": targets_BT,
        }
        return Examples(inputs, [num_targets(targets_BT)])

    def sums(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Nats of all tokens that the decoder has to write, shape (1,)."""
        given = {name: value for name, value in inputs.items() if name != "targets"}
        return nats(model(**given).logits, inputs["targets"])[None]


def lengths(context_length: int) -> tuple[int, int]:
    """Tokens that the encoder sees of a window, and that the decoder writes."""
    noise, spans = num_noise(context_length), num_spans(context_length)
    return context_length - noise + spans + 1, noise + spans + 1


def corrupt(ids_T: Int64s, generator: np.random.Generator) -> tuple[Int64s, Int64s]:
    """Cuts 15% of the tokens out, in spans of 3 on average, none at the start and no two of them together.

    Returns:
        What is left, each span replaced by its sentinel; and the spans, each after its sentinel. Both end with
        end-of-text.
    """
    length = len(ids_T)
    noise = min(num_noise(length), length - 1)
    spans = min(num_spans(length), noise, length - noise)
    if spans < 1:  # a single token: nothing can be left of it
        return np.append(ids_T, _END), np.array([_END])
    lengths = np.empty(2 * spans, dtype=np.int64)
    lengths[0::2], lengths[1::2] = _parts(length - noise, spans, generator), _parts(noise, spans, generator)
    parts = np.split(ids_T, np.cumsum(lengths)[:-1])
    left, cut = [], []
    for number in range(spans):
        sentinel = np.array([_FIRST_SENTINEL + number])
        left += [parts[2 * number], sentinel]
        cut += [sentinel, parts[2 * number + 1]]
    return np.append(np.concatenate(left), _END), np.append(np.concatenate(cut), _END)


def _parts(total: int, count: int, generator: np.random.Generator) -> Int64s:
    """A number as a sum of so many, each at least 1, all sums equally likely."""
    cuts = np.sort(generator.choice(total - 1, size=count - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)
