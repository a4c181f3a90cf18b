"""What a released update says about a record: how far it goes where that record's own gradient would have pushed it.

An update is made of clipped gradients and noise. So its inner product with a record's clipped gradient, at the weights
that the round began with, is larger on average for a record that was in it. It is the white-box attack of Nasr et al.
2019 in its simplest form; ``canaries.py`` does the same with records that were made up for it.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from privacy.audit.attacks import Scores
from privacy.clipping.clipping import Clipper, Losses, Unit


def update_scores(
    clipper: Clipper, unit_losses: Losses[Unit], units: Sequence[Unit], update: Mapping[str, torch.Tensor]
) -> Scores:
    """How far an update goes along each unit's clipped descent, (B,), higher for units that it may hold.

    Args:
        clipper: of the model, which has the weights that the update was made at.
        unit_losses: losses of a batch of units, shape (B,).
        units: the batch.
        update: weights after minus weights before, by parameter name.
    """
    gradients = clipper.source.per_record(lambda: unit_losses(units), len(units))
    norms = gradients.squared_norms().sqrt().cpu().numpy()
    along = np.zeros(len(units))
    for unit in np.flatnonzero(np.isfinite(norms)).tolist():  # others add zero to a sum, and so to this one
        own = gradients.of(unit, clipper.parameters)
        along[unit] = -sum(float((own[name].double() * value.double()).sum()) for name, value in update.items())
    return np.asarray(along * clipper.max_grad_norm / np.fmax(norms, clipper.max_grad_norm), dtype=np.float64)
