"""What an update says about a record, against a loop over single records."""

import numpy as np
import pytest
import torch
from torch import nn

from privacy.audit.updates import update_scores
from privacy.clipping.clipping import clipping

NORM = 0.7


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 4), nn.Flatten(), nn.Linear(12, 3))


def losses_of(model):
    def losses(units):
        return model(torch.tensor(units)).logsumexp(dim=1) * torch.tensor([1.0 + unit[0] for unit in units])

    return losses


def direction(model):
    torch.manual_seed(1)
    return {name: torch.randn_like(value) for name, value in model.named_parameters()}


def one_by_one(model, units, update):
    """Autograd of each record alone."""
    found = []
    for unit in units:
        gradients = torch.autograd.grad(losses_of(model)([unit]).sum(), list(model.parameters()))
        norm = torch.sqrt(sum((one.double() ** 2).sum() for one in gradients))
        along = sum((one.double() * value).sum() for one, value in zip(gradients, update.values(), strict=True))
        found.append(-float(along * min(1.0, NORM / norm)))
    return found


@pytest.mark.parametrize("method", ["bookkeeping", "opacus_hooks"])
def test_scores_are_inner_products_with_each_records_clipped_descent(method):
    model, units = layers(), [(0, 1, 2), (3, 3, 3), (4, 0, 9), (9, 9, 1)]
    update = direction(model)
    with clipping(model, NORM, method) as clipper:
        found = update_scores(clipper, losses_of(model), units, update)
    assert found == pytest.approx(one_by_one(model, units, update), rel=1e-5)
    assert found.dtype == np.float64


def test_a_step_along_a_records_own_gradient_is_found_and_one_that_is_not_finite_adds_nothing():
    model, units = layers(), [(0, 1, 2), (3, 4, 5), (6, 7, 8)]
    losses_of(model)([units[1]]).sum().backward()
    update = {name: -value.grad for name, value in model.named_parameters()}
    model.zero_grad()

    def losses(batch):
        return losses_of(model)(batch) * torch.tensor([float("inf") if unit == units[2] else 1.0 for unit in batch])

    with clipping(model, NORM, "bookkeeping") as clipper:
        found = update_scores(clipper, losses, units, update)
    assert found[1] == max(found) > 0
    assert found[2] == 0
