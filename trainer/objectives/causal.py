"""The causal objective: nats of the next token."""

from typing import Any

import numpy as np

from trainer.data.packing import Windows
from trainer.objectives.pieces import IGNORED, Examples, nats, num_targets, padded, sequences


class Causal:
    """Predicts every token but the first of a piece.

    Args:
        packed: whether the model keeps attention inside runs of consecutive positions, as transformers' decoders do;
            any other one is given a window's pieces as sequences of their own.
    """

    terms = 1

    def __init__(self, *, packed: bool) -> None:
        self._packed = packed

    def examples(self, windows: Windows) -> Examples:
        """The windows as they are, or their pieces one by one."""
        if windows.positions is None:
            return Examples({"tokens": windows.tokens}, [windows.tokens[:, 1:].size])
        if self._packed:
            counts = [int(np.count_nonzero(windows.positions))]
            return Examples({"tokens": windows.tokens, "positions": windows.positions}, counts)
        rows = [piece for row in range(len(windows.tokens)) for piece in sequences(windows, row)]
        targets_BT = padded([np.append(row[1:], IGNORED) for row in rows], IGNORED)
        return Examples({"tokens": padded(rows, 0), "targets": targets_BT}, [num_targets(targets_BT)])

    def sums(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Nats of all targets, shape (1,)."""
        if "targets" in inputs:
            return nats(model(input_ids=inputs["tokens"]).logits, inputs["targets"])[None]
        return next_token_nats(model, inputs["tokens"], inputs.get("positions"))[None]


def next_token_nats(model: Any, tokens_BT: Any, positions_BT: Any = None) -> Any:
    """Sum over the batch of the next tokens' negative log-likelihood, in nats.

    Args:
        model: a causal language model of transformers.
        tokens_BT: the windows.
        positions_BT: each token's position in its piece of a document; None where a window is one piece. transformers
            keeps attention inside runs of consecutive positions, and a token at position 0 is not predicted.
    """
    # Every position keeps its row of logits: to leave the last ones out would copy all of them, there and back.
    targets_BT = tokens_BT.roll(-1, dims=1)
    targets_BT[:, -1] = IGNORED
    if positions_BT is None:
        return nats(model(input_ids=tokens_BT).logits, targets_BT)
    targets_BT[positions_BT.roll(-1, dims=1) == 0] = IGNORED
    return nats(model(input_ids=tokens_BT, position_ids=positions_BT).logits, targets_BT)
