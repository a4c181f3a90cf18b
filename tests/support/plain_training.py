"""Pretraining as a loop over global batches on one process: the oracle of every gang."""

import torch

from trainer.data.batches import Batches
from trainer.models.families import new_model
from trainer.objectives.causal import next_token_nats
from trainer.pretraining.optimizers import learning_rate


def plain_losses(config, corpus, steps, skipped=()):
    """The loss of each step, by step number, without Ray or DeepSpeed."""
    settings, batches = config.pretrain, Batches(config, corpus, skipped)
    model = new_model(config.model, config.tokenizer.vocab_size, config.run.seed).train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    losses = {}
    for step in range(steps):
        windows = batches.share(step, 0, 1).windows
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        positions = None if windows.positions is None else torch.from_numpy(windows.positions)
        targets = windows.tokens[:, 1:].size if positions is None else int(positions.count_nonzero())
        loss = next_token_nats(model, torch.from_numpy(windows.tokens), positions) / targets
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        losses[step + 1] = loss.item()
    return losses
