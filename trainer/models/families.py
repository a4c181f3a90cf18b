"""A new model from a run's settings, whatever its family, and how large it is.

A family's own file has its configuration, and nothing else has to know the family.
"""

from importlib import import_module
from typing import Any

import torch

from configs.errors import InputError
from configs.schema.pretrain import ANY_MODEL, OBJECTIVES, RECURRENT, ModelSettings, Objective
from trainer.models.config_file import reason, require_forward

# The Auto class of transformers whose models have the head that an objective trains.
_CLASSES: dict[Objective, str] = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "next_sentence": "AutoModelForPreTraining",
    "span_corruption": "AutoModelForSeq2SeqLM",
}


def model_config(settings: ModelSettings, vocab_size: int, dropout: float = 0.0) -> Any:
    """The transformers configuration of a new model.

    Dropout belongs to pretraining, not to the model: what is exported, and then trained under DP, has none.

    Raises:
        InputError: ``model.config`` can't be read, or is of no architecture that the installed transformers knows.
    """
    name = "config_file" if settings.config else "recurrent" if settings.family in RECURRENT else settings.family
    return import_module(f"trainer.models.{name}").model_config(settings, vocab_size, dropout)


def new_model(
    settings: ModelSettings, vocab_size: int, seed: int, dropout: float = 0.0, objective: Objective | None = None
) -> Any:
    """A model with random float32 weights that depend on the seed alone.

    Args:
        settings: the run's ``[model]``.
        vocab_size: number of tokens.
        seed: of the weights.
        dropout: while it is pretrained.
        objective: decides the head; None: the family's own.

    Raises:
        InputError: ``model.config`` does not give a model that can be trained so.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _from_config(settings, vocab_size, dropout, objective)
    if settings.config:
        require_forward(model, settings, objective or ANY_MODEL[0])
    return model


def empty_model(settings: ModelSettings, vocab_size: int, objective: Objective | None = None) -> Any:
    """A model whose parameters have shapes and no values, on torch's device ``meta``."""
    with torch.device("meta"):
        return _from_config(settings, vocab_size, 0.0, objective)


def parameter_sizes(settings: ModelSettings, vocab_size: int, objective: Objective | None = None) -> list[int]:
    """Number of values of each parameter, without allocating them."""
    return [parameter.numel() for parameter in empty_model(settings, vocab_size, objective).parameters()]


def attention() -> str:
    """Attention kernel: on a CPU, at these sizes, plain matrix products beat torch's fused kernel."""
    return "sdpa" if torch.cuda.is_available() else "eager"


def _from_config(settings: ModelSettings, vocab_size: int, dropout: float, objective: Objective | None) -> Any:
    import transformers

    config = model_config(settings, vocab_size, dropout)
    chosen = objective or (ANY_MODEL if settings.config else OBJECTIVES[settings.family])[0]
    make = getattr(transformers, _CLASSES[chosen]).from_config
    try:
        return make(config, dtype=torch.float32, attn_implementation=attention())
    except Exception as error:
        # Whatever a configuration's numbers make a library's layers raise.
        if not settings.config:
            raise
        raise InputError(
            f"model.config {settings.config!r}: gives no model for pretrain.objective {chosen!r} ({reason(error)}); "
            "give another objective, or another architecture"
        ) from None
