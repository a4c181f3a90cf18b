"""What pretraining minimises, and how it is validated."""

import math
from pathlib import Path
from typing import Any

from configs.schema.schema import RunConfig
from trainer.data.packing import VALIDATION_TOKENS, TokenFile, stored_dtype
from trainer.objectives.causal import next_token_nats
from trainer.rank import Rank


def validate(engine: Any, config: RunConfig, corpus: Path, metadata: dict[str, Any], rank: Rank) -> dict[str, float]:
    """Validation loss (nats per token) and bits per character, over all windows of the validation file.

    Bits per character don't depend on the tokenizer: bits per token times tokens per character of the held-out text.
    """
    import numpy as np
    import torch
    from torch import distributed

    tokens = TokenFile(corpus / VALIDATION_TOKENS, config.model.context_length, stored_dtype(corpus))
    # Equal numbers of batches on every rank: under ZeRO-3 each forward is a collective.
    share = math.ceil(tokens.num_windows / rank.world_size)
    totals = torch.zeros(2, device=engine.device, dtype=torch.float64)
    engine.eval()
    with torch.no_grad():
        for start in range(0, share, config.pretrain.micro_batch_size):
            places = np.arange(start, min(start + config.pretrain.micro_batch_size, share))
            mine = rank.rank + places * rank.world_size
            inside = mine[mine < tokens.num_windows]
            windows = inside if len(inside) else np.zeros(1, dtype=np.int64)
            nats = next_token_nats(engine, *to_tensors(tokens.windows(windows), tokens.positions(windows), engine))
            if len(inside):
                totals += torch.stack([nats.double(), nats.new_tensor(tokens.num_targets(inside)).double()])
    engine.train()
    distributed.all_reduce(totals)
    loss = (totals[0] / totals[1]).item()
    counts = metadata["validation"]
    return {"loss": loss, "bits_per_char": loss / math.log(2) * counts["tokens"] / counts["characters"]}


def to_tensors(tokens: Any, positions: Any, engine: Any) -> tuple[Any, Any]:
    """Arrays of windows, and of positions where there are any, on the engine's device."""
    import torch

    on_device = [None if array is None else torch.from_numpy(array).to(engine.device) for array in (tokens, positions)]
    return on_device[0], on_device[1]
