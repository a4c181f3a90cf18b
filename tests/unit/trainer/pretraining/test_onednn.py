"""oneDNN's products against float64 ones, and when they are taken."""

import pytest
import torch

from trainer.pretraining import onednn as linear

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def results(layer, inputs):
    """Output, and the gradients of inputs and parameters, of a loss that weighs every output differently."""
    inputs = inputs.clone().requires_grad_()
    layer.zero_grad()
    output = layer(inputs)
    (output * torch.linspace(-0.5, 1.5, output.numel(), dtype=output.dtype).view(output.shape)).sum().backward()
    return output.detach(), inputs.grad, *[parameter.grad for parameter in layer.parameters()]


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("shape", "rows", "columns"), [((8, 128), 704, 256), ((3, 5), 8, 64), ((7,), 1, 3)])
def test_products_are_the_float64_ones_to_float32_s_rounding(shape, rows, columns, bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(columns, rows, bias=bias)
    inputs = torch.randn(*shape, columns)
    exact_layer = torch.nn.Linear(columns, rows, bias=bias).double()
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


def test_other_layers_stay_as_they_are():
    model = torch.nn.Sequential(torch.nn.Bilinear(4, 4, 4), torch.nn.Linear(4, 4), torch.nn.Embedding(4, 4))
    names = list(model.state_dict())
    linear.use_onednn(model)
    assert [type(module) is linear.OneDnnLinear for module in model] == [False, True, False]
    assert list(model.state_dict()) == names


@needs_onednn
@pytest.mark.parametrize(
    ("processor", "capability", "taken"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\n", "AVX512", True),
        ("vendor_id\t: AuthenticAMD\n", "AVX2", False),
        ("vendor_id\t: GenuineIntel\n", "AVX512", False),
        ("CPU implementer\t: 0x41\n", "DEFAULT", False),
        (None, "AVX512", False),
    ],
)
def test_the_kind_of_processor_chooses(processor, capability, taken, monkeypatch, tmp_path):
    path = tmp_path / "cpuinfo"
    if processor is not None:
        path.write_text(processor)
    monkeypatch.setattr(linear, "_PROCESSOR", path)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert linear.mkl_holds_back.__wrapped__() is taken


@pytest.mark.parametrize("library", ["mkldnn", "mkl"])
def test_without_either_library_torchs_own_products_stay(library, monkeypatch, tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("vendor_id\t: AuthenticAMD\n")
    monkeypatch.setattr(linear, "_PROCESSOR", path)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(getattr(torch.backends, library), "is_available", lambda: False)
    assert linear.mkl_holds_back.__wrapped__() is False
