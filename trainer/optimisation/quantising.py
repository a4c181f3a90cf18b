"""Weights of linear layers as integers, by torchao, in the form that transformers writes and reads."""

from typing import Any

import torch

from configs.errors import InputError
from trainer.models.load import require_torchao

_GROUPS = (32, 16, 8)  # weights of one scale, where they have 4 bits: as many as divide the inputs of all layers


def quantise(model: Any, method: str) -> None:
    """Makes integers of the weights of linear layers; embeddings, heads and what is tied to them stay as they are.

    Args:
        model: it is changed, and saves itself with what it takes to load it.
        method: ``int8``: 8 bits, and what a layer reads is rounded to 8 bits, too, row by row; ``int4``: 4 bits, a
            scale for every 32 weights or fewer, and what a layer reads stays as it is.

    Raises:
        InputError: torchao is not installed, or the model has no layer that it can take.
    """
    require_torchao(f"--method {method}")
    from torchao.quantization import quantize_
    from transformers import TorchAoConfig
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    apart = _outside(model)
    kind = _kind(model, method, apart)
    quantizer = TorchAoHfQuantizer(TorchAoConfig(kind, modules_to_not_convert=apart), pre_quantized=False)
    quantizer.preprocess_model(model)
    for name, _ in list(model.named_parameters()):
        if quantizer.param_needs_quantization(model, name):
            quantize_(model.get_submodule(name.removesuffix(".weight")), kind, filter_fn=lambda *_: True)
    model.config.quantization_config, model.hf_quantizer = quantizer.quantization_config, quantizer


def stored(value: torch.Tensor) -> list[torch.Tensor]:
    """What a weight is on disk: itself, or integers and the scales that give them their size."""
    if not hasattr(value, "__tensor_flatten__"):
        return [value]
    return [getattr(value, name) for name in value.__tensor_flatten__()[0]]


def _outside(model: Any) -> list[str]:
    """Linear layers that stay as they are: heads, and what gives the words."""
    body = {id(module) for module in model.base_model.modules()} if model.base_model is not model else set()
    words = model.get_output_embeddings()
    return [name for name, layer in _linear(model).items() if (body and id(layer) not in body) or layer is words]


def _linear(model: Any) -> dict[str, torch.nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def _kind(model: Any, method: str, apart: list[str]) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, IntxWeightOnlyConfig, PerGroup

    layers = {name: layer for name, layer in _linear(model).items() if name not in apart}
    if not layers:
        raise InputError(
            f"--method {method}: a {type(model).__name__} has no layer that torchao can take; give --method prune"
        )
    if method == "int8":
        return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    of_torch: Any = torch  # whose types lack int4
    for group in _GROUPS:
        if not any(layer.in_features % group for layer in layers.values()):
            return IntxWeightOnlyConfig(weight_dtype=of_torch.int4, granularity=PerGroup(group))
    name, layer = next((name, layer) for name, layer in layers.items() if layer.in_features % _GROUPS[-1])
    raise InputError(
        f"--method int4: {name} has {layer.in_features} inputs, no multiple of {_GROUPS[-1]}; give --method int8"
    )
