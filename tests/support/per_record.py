"""The sum of clipped gradients by a loop over single records, which is slow and obviously right."""

import torch

from privacy.clipping.clipping import clipping
from trainer.models.adapters import trainable


def one_by_one(model, losses, records):
    """Each record's gradient, by an ordinary backward of its own."""
    parameters = trainable(model)
    for record in records:
        found = torch.autograd.grad(
            losses([record]).sum(), list(parameters.values()), allow_unused=True, materialize_grads=True
        )
        yield dict(zip(parameters, [gradient.double() for gradient in found], strict=True))


def length(gradients):
    return torch.sqrt(sum(gradient.double().square().sum() for gradient in gradients.values()))


def oracle(model, losses, records, factor):
    total = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in trainable(model).items()}
    for gradients in one_by_one(model, losses, records):
        for name, gradient in gradients.items():
            total[name] += factor(length(gradients).item()) * gradient
    return total


def fixed(norm):
    return lambda size: min(1.0, norm / (size + 1e-6))


def assert_equal(found, expected, tolerance=1e-4):
    whole = length(expected)
    for name, value in expected.items():
        scale = max(value.norm().item(), 1e-2 * whole.item())
        assert (found[name].double() - value).norm().item() <= tolerance * scale, name


def clipped(model, losses, micro_batches, norm, **options):
    with clipping(model, norm, **options) as clipper:
        for micro in micro_batches:
            clipper.accumulate(losses, micro)
        return clipper.take()
