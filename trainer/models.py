"""Model families through transformers' configurations, started at random, and adapters through peft."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from configs.artifacts import read_manifest
from configs.encryption import MasterKey, opened
from configs.pretrain_settings import ModelSettings

MODEL = "model"

# All linear layers. The output head matters most: a new domain's words are the first thing to learn.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


def model_config(settings: ModelSettings, vocab_size: int, dropout: float = 0.0) -> Any:
    """The transformers configuration of a Llama-style decoder; embeddings and head are not tied.

    Dropout belongs to pretraining, not to the model: what is exported, and then trained under DP, has none.
    """
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        intermediate_size=settings.intermediate_size,
        max_position_embeddings=settings.context_length,
        tie_word_embeddings=False,
        use_cache=False,
        attention_dropout=dropout,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def new_model(settings: ModelSettings, vocab_size: int, seed: int, dropout: float = 0.0) -> Any:
    """A model with random float32 weights that depend on the seed alone."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(
            model_config(settings, vocab_size, dropout), dtype=torch.float32, attn_implementation=attention()
        )


def attention() -> str:
    """Attention kernel: on a CPU, at these sizes, plain matrix products beat torch's fused kernel."""
    return "sdpa" if torch.cuda.is_available() else "eager"


def parameter_sizes(settings: ModelSettings, vocab_size: int) -> list[int]:
    """Number of values of each parameter, without allocating them."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(settings, vocab_size))
    return [parameter.numel() for parameter in model.parameters()]


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Makes the dropout masks of a step a function of seed, step and rank: a restart draws the same ones again.

    They still depend on the number of ranks, since a rank's share of the batch does.
    """
    digest = hashlib.sha256(f"dropout {seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def load_model(directory: Path, key: MasterKey | None = None) -> Any:
    """The model of an exported directory, float32, in evaluation mode. Reads safetensors only, never pickles.

    Raises:
        InputError: its weights were not written with this key, or were made with other settings than its manifest says.
    """
    from transformers import AutoModelForCausalLM

    manifest = read_manifest(directory, MODEL)
    owner = manifest.config_digest if manifest else ""
    with opened(directory, key, f"{owner}/{MODEL}", older=MODEL) as folder:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            attn_implementation=attention(),
        )
    return model.eval()


def add_adapter(model: Any, rank: int, alpha: float, seed: int) -> Any:
    """Wraps a model with LoRA on all its linear layers (Hu et al. 2021; peft); only the adapter trains.

    A starts at random from the seed, B at zero: the wrapped model starts out equal to the base model.
    """
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = get_peft_model(
            model,
            LoraConfig(
                r=rank, lora_alpha=alpha, target_modules=list(LORA_TARGETS), lora_dropout=0.0, task_type="CAUSAL_LM"
            ),
        )
    # peft makes a set of them, and would save it in the order of the process: another digest at each save.
    wrapped.peft_config["default"].target_modules = sorted(LORA_TARGETS)
    return wrapped


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
