"""oneDNN's products against float64 ones, and when they are taken."""

import pytest
import torch
from torch.nn import functional

from trainer import linear

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def results(layer, inputs):
    """Output, and the gradients of inputs and weight, of a loss that weighs every output differently."""
    inputs = inputs.clone().requires_grad_()
    layer.weight.grad = None
    output = layer(inputs)
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)).sum().backward()
    return output.detach(), inputs.grad, layer.weight.grad


@needs_onednn
@pytest.mark.parametrize(("shape", "rows", "columns"), [((8, 128), 704, 256), ((3, 5), 8, 64), ((7,), 1, 3)])
def test_products_are_the_float64_ones_to_float32_s_rounding(shape, rows, columns):
    torch.manual_seed(0)
    layer = torch.nn.Linear(columns, rows, bias=False)
    inputs = torch.randn(*shape, columns)
    exact_layer = torch.nn.Linear(columns, rows, bias=False).double()
    exact_layer.load_state_dict(layer.state_dict())
    exact = results(exact_layer, inputs.double())
    linear.use_onednn(layer)
    for found, wanted in zip(results(layer, inputs), exact, strict=True):
        assert found.dtype == torch.float32
        assert found.shape == wanted.shape
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()


@needs_onednn
def test_what_needs_no_gradient_gets_none():
    layer = torch.nn.Linear(4, 6, bias=False)
    linear.use_onednn(layer)
    layer(torch.ones(2, 4)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.full((6, 4), 2.0))
    layer.weight.requires_grad_(requires_grad=False)
    inputs = torch.ones(2, 4, requires_grad=True)
    layer(inputs).sum().backward()
    assert torch.allclose(inputs.grad, layer.weight.sum(0).expand(2, 4))


def test_layers_with_bias_and_others_stay_as_they_are():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4, bias=False), torch.nn.Embedding(4, 4))
    names = list(model.state_dict())
    linear.use_onednn(model)
    assert [type(module) is torch.nn.Linear for module in model] == [True, False, False]
    assert list(model.state_dict()) == names
    assert torch.allclose(model[1](torch.eye(4)), functional.linear(torch.eye(4), model[1].weight))


@needs_onednn
@pytest.mark.parametrize(
    ("vendor", "capability", "holds"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
    ],
)
def test_only_where_mkl_leaves_avx512_unused(vendor, capability, holds, tmp_path, monkeypatch):
    processor = tmp_path / "cpuinfo"
    processor.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(linear, "_CPU_INFO", processor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert linear.mkl_holds_back() is holds
