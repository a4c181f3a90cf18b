"""Dropout that depends on seed and step alone."""

import hashlib

import torch


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Makes the dropout masks of a step a function of seed, step and rank: a restart draws the same ones again.

    They still depend on the number of ranks, since a rank's share of the batch does.
    """
    digest = hashlib.sha256(f"dropout {seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big", signed=True))
