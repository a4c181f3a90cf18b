"""What of a base model trains and travels: a LoRA adapter beside it, through peft, or some of its own parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from configs.errors import InputError
from configs.imports import import_large
from configs.schema.federated import BaseDtype, Train
from trainer.models.bfloat16 import round_frozen
from trainer.models.load import Head

_TASK_TYPES = {
    "classification": "SEQ_CLS",
    "token classification": "TOKEN_CLS",
    "question answering": "QUESTION_ANS",
}


class AdaptationError(InputError):
    """A model can't be adapted as asked. Says nothing that the model's configuration doesn't."""


@dataclass(frozen=True)
class Adaptation:
    """What of a base model trains and travels.

    Attributes:
        rank: of LoRA.
        alpha: its scale.
        train: LoRA beside the model, or parameters of the model itself.
        targets: own names of the layers with LoRA; empty: all linear ones.
        base_dtype: of the weights that LoRA leaves as they are.
        head: what the task has put on the model; it trains as a whole, whatever else does.
    """

    rank: int
    alpha: float
    train: Train = "lora"
    targets: tuple[str, ...] = ()
    base_dtype: BaseDtype = "float32"
    head: Head | None = None


def adapted(model: Any, how: Adaptation, seed: int) -> Any:
    """The model, of which only what is asked for trains; where that is LoRA, wrapped by peft.

    Raises:
        AdaptationError: the model hasn't got what is to train.
    """
    if how.train == "lora":
        wrapped = add_adapter(model, how.rank, how.alpha, seed, how.targets, how.head)
        if how.base_dtype == "bfloat16":
            round_frozen(wrapped)
        return wrapped
    of_head = _below(head_names(model), model) if how.head else set()
    chosen = of_head if of_head and how.train == "head" else _OWN[how.train](model) | of_head
    for name, value in model.named_parameters():
        value.requires_grad_(name in chosen)
    return model


def add_adapter(
    model: Any, rank: int, alpha: float, seed: int, targets: tuple[str, ...] = (), head: Head | None = None
) -> Any:
    """Wraps a model with LoRA on linear layers (Hu et al. 2021; peft); only the adapter trains, and a task's head.

    A starts at random from the seed, B at zero: the wrapped model starts out equal to the base model.

    Args:
        model: the base model.
        rank: of the adapter.
        alpha: its scale.
        seed: that A is drawn from.
        targets: own names of the layers; empty: all.
        head: what the task has put on the model, which trains as a whole.

    Raises:
        AdaptationError: a target is no linear layer of the model's.
    """
    import_large("peft")
    from peft import LoraConfig, get_peft_model

    whole = head_names(model) if head else []
    layers = [name for name in (_checked(targets, model) if targets else linear_names(model)) if name not in whole]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = get_peft_model(
            model,
            LoraConfig(
                r=rank,
                lora_alpha=alpha,
                target_modules=layers,
                modules_to_save=whole or None,
                lora_dropout=0.0,
                task_type=_TASK_TYPES[head.kind] if head else _task_type(model),
            ),
        )
    # peft makes a set of them, and would save it in the order of the process: another digest at each save.
    wrapped.peft_config["default"].target_modules = layers
    return wrapped


def head_names(model: Any) -> list[str]:
    """The names of what stands beside the model's own body, and has weights."""
    body = model.base_model_prefix
    return [name for name, part in model.named_children() if name != body and any(True for _ in part.parameters())]


def _below(parts: list[str], model: Any) -> set[str]:
    """Names of the parameters of parts."""
    return {name for name, _ in model.named_parameters() if name.split(".")[0] in parts}


def depths(model: Any) -> dict[str, int]:
    """How far up each parameter lies: 0 an embedding, 1 the lowest layer, and one more than all layers what is above.

    A layer is what stands in a list of modules, outermost; encoder and decoder count from 1 each. What comes before
    them all is an embedding as well, such as the norm of BERT's.
    """
    modules, found, above = dict(model.named_modules()), {}, []
    for name, _ in model.named_parameters():
        layer = _layer(name, modules)
        if layer is not None:
            found[name] = layer + 1
        elif not any(found.values()) or isinstance(modules[name.rpartition(".")[0]], torch.nn.Embedding):
            found[name] = 0
        else:
            above.append(name)
    return found | dict.fromkeys(above, max(found.values(), default=0) + 1)


def _layer(name: str, modules: Mapping[str, Any]) -> int | None:
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal() and isinstance(modules[".".join(parts[:place])], torch.nn.ModuleList):
            return int(part)
    return None


def linear_names(model: Any) -> list[str]:
    """The own names of a model's linear layers, sorted: peft's "all-linear", and the output head.

    The head matters most: a new domain's words are the first thing to learn. Where it shares the embedding's weight it
    has no adapter: merged into the weight, one would change the embedding, too.
    """
    from transformers.pytorch_utils import Conv1D

    linear = (torch.nn.Linear, Conv1D)
    found = {name.rsplit(".", 1)[-1] for name, layer in model.named_modules() if isinstance(layer, linear)}
    return sorted(found - _tied_head(model))


def _checked(targets: tuple[str, ...], model: Any) -> list[str]:
    """Targets, sorted, where each is a layer that can have LoRA."""
    possible = linear_names(model)
    tied, unknown = _tied_head(model) & set(targets), sorted(set(targets) - set(possible))
    if tied:
        raise AdaptationError(
            f"federated.adapter_targets has {tied.pop()!r}: the output head shares the embedding's weight, which an "
            "adapter would change, too; leave it out"
        )
    if unknown:
        raise AdaptationError(
            f"federated.adapter_targets has {unknown[0]!r}: no linear layer of this model; it has {', '.join(possible)}"
        )
    return sorted(set(targets))


def _all(model: Any) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def _head(model: Any) -> set[str]:
    """The output head's parameters, where no other layer has them."""
    head = model.get_output_embeddings()
    if head is None:
        raise AdaptationError("federated.train is 'head': this model has no output head; give 'lora' or 'full'")
    if _tied_head(model):
        raise AdaptationError(
            "federated.train is 'head': this model's output head shares the embedding's weight, which would train, "
            "too; give 'lora' or 'full'"
        )
    own = {id(value) for value in head.parameters()}
    return {name for name, value in model.named_parameters() if id(value) in own}


def _biases(model: Any) -> set[str]:
    """Every bias (BitFit, Ben Zaken et al. 2022)."""
    found = {name for name, _ in model.named_parameters() if name.rsplit(".", 1)[-1] == "bias"}
    if not found:
        raise AdaptationError("federated.train is 'bitfit': this model has no biases; give 'lora', 'full' or 'head'")
    return found


_OWN: dict[str, Callable[[Any], set[str]]] = {"full": _all, "head": _head, "bitfit": _biases}


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
