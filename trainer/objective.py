"""What pretraining minimises, and how it is validated."""

import math
from pathlib import Path
from typing import Any

from configs.schema import RunConfig
from trainer.data.packing import TokenFile
from trainer.data.prepare import VALIDATION_TOKENS
from trainer.zero import Rank


def next_token_nats(model: Any, tokens_BT: Any) -> Any:
    """Sum over the batch of the next tokens' negative log-likelihood, in nats."""
    from torch.nn import functional

    logits_BTV = model(input_ids=tokens_BT).logits.float()
    return functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten(), reduction="sum")


def validate(engine: Any, config: RunConfig, corpus: Path, metadata: dict[str, Any], rank: Rank) -> dict[str, float]:
    """Validation loss (nats a token) and bits per character, over all windows of the validation file.

    Bits per character don't depend on the tokenizer: bits a token times tokens a character of the held-out text.
    """
    import numpy as np
    import torch
    from torch import distributed

    tokens = TokenFile(corpus / VALIDATION_TOKENS, config.model.context_length)
    # Equal numbers of batches on every rank: under ZeRO-3 each forward is a collective.
    share = math.ceil(tokens.num_windows / rank.world_size)
    mine = [index for i in range(share) if (index := rank.rank + i * rank.world_size) < tokens.num_windows]
    totals = torch.zeros(2, device=engine.device)
    engine.eval()
    with torch.no_grad():
        for start in range(0, share, config.pretrain.micro_batch_size):
            indices = mine[start : start + config.pretrain.micro_batch_size]
            windows = torch.from_numpy(tokens.windows(np.asarray(indices or [0]))).to(engine.device)
            if indices:
                totals += torch.stack(
                    [
                        next_token_nats(engine, windows),
                        torch.tensor(float(windows[:, 1:].numel()), device=engine.device),
                    ]
                )
            else:
                next_token_nats(engine, windows)
    engine.train()
    distributed.all_reduce(totals)
    loss = (totals[0] / totals[1]).item()
    counts = metadata["validation"]
    return {"loss": loss, "bits_per_char": loss / math.log(2) * counts["tokens"] / counts["characters"]}
