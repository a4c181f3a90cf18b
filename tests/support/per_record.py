"""The sum of clipped gradients by a loop over single records, which is slow and obviously right."""

import torch

from privacy.clipping.clipping import clipping
from privacy.clipping.independence import made_up_weights
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


def alike_here(model, losses, units):
    """Whether this processor gives units the same bits together as alone, by passes back to the embeddings.

    Some processors don't where attention looks both ways (seen on an AMD EPYC). Units are computed one by one there,
    which is right, and slower; everywhere else a test asks for more than one at a time.
    """
    for scale in (0.5, 8.0):
        with made_up_weights(trainable(model), scale):
            together = _at_embeddings(model, losses, units)
            for place, unit in enumerate(units):
                alone = _at_embeddings(model, losses, [unit])
                if not all(torch.equal(one[0], all_[place]) for one, all_ in zip(alone, together, strict=True)):
                    return False
    return True


def _at_embeddings(model, losses, units):
    """Gradients of the embedded tokens, (B, T, D) for each time that a pass embeds some."""
    seen = []

    def keep(_module, _inputs, embedded):
        seen.append(embedded.detach().requires_grad_())
        return seen[-1]

    tokens = (
        model.get_input_embeddings().weight
    )  # which an encoder and a decoder may look up each in a layer of its own
    layers = [
        one for one in model.modules() if getattr(one, "weight", None) is tokens and hasattr(one, "num_embeddings")
    ]
    hooks = [one.register_forward_hook(keep) for one in layers]
    try:
        return torch.autograd.grad(losses(units).sum(), seen)
    finally:
        for hook in hooks:
            hook.remove()
