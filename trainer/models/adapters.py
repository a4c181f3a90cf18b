"""Model families through transformers' configurations, started at random, and adapters through peft."""

from collections.abc import Mapping
from typing import Any

import torch

from trainer.models.load import Head

_TASK_TYPES = {
    "classification": "SEQ_CLS",
    "token classification": "TOKEN_CLS",
    "question answering": "QUESTION_ANS",
}


def add_adapter(model: Any, rank: int, alpha: float, seed: int, head: Head | None = None) -> Any:
    """Wraps a model with LoRA on all its linear layers (Hu et al. 2021; peft); only the adapter trains.

    A starts at random from the seed, B at zero: the wrapped model starts out equal to the base model. A head that a
    task has put on the model trains as a whole.
    """
    from peft import LoraConfig, get_peft_model

    whole = head_names(model) if head else []
    targets = [name for name in linear_names(model) if name not in whole]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = get_peft_model(
            model,
            LoraConfig(
                r=rank,
                lora_alpha=alpha,
                target_modules=targets,
                modules_to_save=whole or None,
                lora_dropout=0.0,
                task_type=_TASK_TYPES[head.kind] if head else _task_type(model),
            ),
        )
    # peft makes a set of them, and would save it in the order of the process: another digest at each save.
    wrapped.peft_config["default"].target_modules = targets
    return wrapped


def head_names(model: Any) -> list[str]:
    """The names of what stands beside the model's own body, and has weights."""
    body = model.base_model_prefix
    return [name for name, part in model.named_children() if name != body and any(True for _ in part.parameters())]


def linear_names(model: Any) -> list[str]:
    """The own names of a model's linear layers, sorted: peft's "all-linear", and the output head.

    The head matters most: a new domain's words are the first thing to learn. Where it shares the embedding's weight it
    has no adapter: merged into the weight, one would change the embedding, too.
    """
    from transformers.pytorch_utils import Conv1D

    linear = (torch.nn.Linear, Conv1D)
    found = {name.rsplit(".", 1)[-1] for name, layer in model.named_modules() if isinstance(layer, linear)}
    return sorted(found - _tied_head(model))


def _tied_head(model: Any) -> set[str]:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None or head.weight is not embedding.weight:
        return set()
    return {name.rsplit(".", 1)[-1] for name, layer in model.named_modules() if layer is head}


def _task_type(model: Any) -> str | None:
    """The name that peft has for how a model is called; None for one that writes no text."""
    if not model.can_generate():
        return None
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    """Detached copies of the trainable parameters, by name, in name order."""
    return {name: value.detach().clone() for name, value in sorted(trainable(model).items())}


def load_adapter_weights(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Copies weights into the trainable parameters.

    Raises:
        ValueError: names or shapes are not those of the model's adapter.
    """
    parameters = trainable(model)
    if shapes(parameters) != shapes(weights):
        raise ValueError("the adapter's names or shapes are not the model's")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def shapes(arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of each array or tensor, by name."""
    return {name: tuple(value.shape) for name, value in arrays.items()}


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters that train, by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}
