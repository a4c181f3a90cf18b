"""The causal objective: nats of the next token."""

from typing import Any

_NO_TARGET = -100


def next_token_nats(model: Any, tokens_BT: Any, positions_BT: Any = None) -> Any:
    """Sum over the batch of the next tokens' negative log-likelihood, in nats.

    Args:
        model: a causal language model of transformers.
        tokens_BT: the windows.
        positions_BT: each token's position in its piece of a document; None where a window is one piece. transformers
            keeps attention inside runs of consecutive positions, and a token at position 0 is not predicted.
    """
    from torch.nn import functional

    # Every position keeps its row of logits: to leave the last ones out would copy all of them, there and back.
    targets_BT = tokens_BT.roll(-1, dims=1)
    targets_BT[:, -1] = _NO_TARGET
    if positions_BT is None:
        logits_BTV = model(input_ids=tokens_BT).logits.float()
    else:
        logits_BTV = model(input_ids=tokens_BT, position_ids=positions_BT).logits.float()
        targets_BT[positions_BT.roll(-1, dims=1) == 0] = _NO_TARGET
    return functional.cross_entropy(
        logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum", ignore_index=_NO_TARGET
    )
