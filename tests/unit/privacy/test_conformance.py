"""The privacy traps by the checks that the benchmark runs, and that these checks can fail."""

import pytest
import torch
from traps import engine as measured
from traps import masks, siloweave
from traps.layers import LAYERS

from privacy.mechanism.streams import Streams

REAL = measured.train_privately


@pytest.mark.parametrize("layer", ["linear", "embedding", "layer_norm", "rms_norm", "conv1d", "lora"])
def test_the_clipped_sum_of_a_layer_is_that_of_single_records(layer):
    cell = siloweave.clipped_sum(layer)
    assert cell.verdict == "pass", cell.evidence


@pytest.mark.parametrize("layer", ["padding_idx", "module_tie", "functional_tie", "broadcast"])
def test_what_hooks_get_wrong_is_exact_or_refused(layer):
    cell = siloweave.clipped_sum(layer)
    assert cell.verdict in ("pass", "refuses"), cell.evidence


def test_every_layer_is_in_one_of_the_two_lists():
    marks = (test_the_clipped_sum_of_a_layer_is_that_of_single_records, test_what_hooks_get_wrong_is_exact_or_refused)
    assert {name for test in marks for name in test.pytestmark[0].args[1]} == set(LAYERS)


@pytest.mark.parametrize(
    "check",
    [
        siloweave.largest,
        siloweave.micro_batches,
        siloweave.non_finite,
        siloweave.noise,
        siloweave.world_sizes,
        siloweave.empty_batch,
        siloweave.sampling,
        siloweave.zero_update,
        siloweave.generator,
        siloweave.client_sampling,
        siloweave.dropout,
        siloweave.weights,
    ],
    ids=lambda check: check.__name__,
)
def test_the_engine_holds(check):
    cell = check()
    assert cell.verdict == "pass", cell.evidence


def test_a_shuffling_sampler_is_refused():
    assert siloweave.shuffling().verdict == "refuses"


@pytest.mark.parametrize("trap", ["restored", "without_wal"])
def test_an_older_ledger_file_put_back_is_refused(trap):
    cell = siloweave.CELLS[trap]()
    assert cell.verdict == "refuses", cell.evidence


def changed(plan, **changes):
    return plan.terms.model_copy(update=changes).bind(plan.public_record_count)


def noise_over_4(plan, *arguments, **options):
    REAL(changed(plan, noise_multiplier=plan.terms.noise_multiplier / 4), *arguments, **options)


def clipping_off(plan, *arguments, **options):
    norm, sigma = plan.terms.max_grad_norm, plan.terms.noise_multiplier
    REAL(changed(plan, max_grad_norm=norm * 1e6, noise_multiplier=sigma / 1e6), *arguments, **options)


def clipping_after_the_mean(plan, streams, model, optimizer, units, *, unit_losses, **_):
    losses = unit_losses(list(units))
    parameters = [value for value in model.parameters() if value.requires_grad]
    gradients = torch.autograd.grad(losses.mean(), parameters)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    factor = (plan.terms.max_grad_norm / norm).clamp(max=1) * len(losses) / plan.expected_batch_size
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient * factor
    optimizer.step()


def shuffling(plan, streams, model, optimizer, units, **options):
    """Goes through the units epoch by epoch, in batches of the expected size."""
    size = round(plan.expected_batch_size)
    draw, order = torch.Generator().manual_seed(0), []
    for step in range(plan.terms.steps_per_round):
        order = order if len(order) >= size else torch.randperm(len(units), generator=draw).tolist()
        batch, order = [units[index] for index in order[:size]], order[size:]
        one = changed(plan, steps_per_round=1, sampling_rate=measured.ALMOST_ONE)
        REAL(one, Streams(bytes([step % 256] * 32), measured.DIGEST), model, optimizer, batch, **options)


def clipped_linear():
    return siloweave.clipped_sum("linear")


@pytest.mark.parametrize(
    ("mutation", "check"),
    [
        (noise_over_4, siloweave.noise),
        (clipping_off, siloweave.largest),
        (clipping_off, clipped_linear),
        (clipping_after_the_mean, clipped_linear),
        (shuffling, lambda: siloweave.sampling(steps=200)),
    ],
)
def test_a_broken_engine_fails_the_check(monkeypatch, mutation, check):
    assert check().verdict == "pass"
    monkeypatch.setattr(measured, "train_privately", mutation)
    assert check().verdict == "fails"


def test_masks_hang_on_256_bits_of_their_key_and_the_check_finds_those_that_do_not():
    assert siloweave.CELLS["mask_keys"]().verdict == "pass"
    assert masks.flower().verdict == "fails"
