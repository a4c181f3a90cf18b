"""How well the model does on the text that was held out from pretraining."""

import math
from pathlib import Path
from typing import Any

from configs.schema.schema import RunConfig
from trainer.data.packing import VALIDATION_TOKENS, TokenFile, Windows, stored_dtype
from trainer.objectives.objective import Objective
from trainer.rank import Rank


def validate(
    engine: Any, objective: Objective, config: RunConfig, corpus: Path, metadata: dict[str, Any], rank: Rank
) -> dict[str, float]:
    """The loss over all windows of the validation file; where each token is predicted, bits per character, too.

    Bits per character don't depend on the tokenizer: bits per token times tokens per character of the held-out text.
    """
    import numpy as np
    import torch
    from torch import distributed

    file = TokenFile(corpus / VALIDATION_TOKENS, config.model.context_length, stored_dtype(corpus))
    # Equal numbers of batches on every rank: under ZeRO-3 each forward is a collective.
    share = math.ceil(file.num_windows / rank.world_size)
    totals = torch.zeros(2, objective.terms, device=engine.device, dtype=torch.float64)
    engine.eval()
    with torch.no_grad():
        for start in range(0, share, config.pretrain.micro_batch_size):
            places = np.arange(start, min(start + config.pretrain.micro_batch_size, share))
            mine = rank.rank + places * rank.world_size
            inside = mine[mine < file.num_windows]
            windows = inside if len(inside) else np.zeros(1, dtype=np.int64)
            examples = objective.examples(Windows((file,) * len(windows), windows, windows, held_out=True))
            sums = objective.sums(engine, to_tensors(examples.inputs, engine))
            if len(inside):
                totals += torch.stack([sums.double(), sums.new_tensor(examples.counts).double()])
    engine.train()
    distributed.all_reduce(totals)
    loss = (totals[0] / totals[1].clamp(min=1)).sum().item()
    if config.objective != "causal":
        return {"loss": loss}
    counts = metadata["validation"]
    return {"loss": loss, "bits_per_char": loss / math.log(2) * counts["tokens"] / counts["characters"]}


def to_tensors(arrays: dict[str, Any], engine: Any) -> dict[str, Any]:
    """Arrays on the engine's device."""
    import torch

    return {name: torch.from_numpy(array).to(engine.device) for name, array in arrays.items()}
