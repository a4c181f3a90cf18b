"""Any architecture that transformers knows, by a ``config.json``: shapes are read from it, never weights or code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import InputError
from configs.schema.pretrain import ModelSettings, Objective
from configs.storage.files import digest_json

if TYPE_CHECKING:
    import torch

_LARGEST_BYTES = 2**20
_ROUNDING = 1e-4


def model_config(settings: ModelSettings, vocab_size: int, dropout: float = 0.0) -> Any:
    """The transformers configuration of the file, with the run's vocabulary, special tokens and dropout.

    Raises:
        InputError: it can't be read, asks for code of its own, names no known architecture, or has too few positions.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    path, fields = settings.config, _read(settings.config)
    kind = fields.pop("model_type", None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING_NAMES:
        raise InputError(
            f"model.config {path!r}: model_type is {kind!r}, which the installed transformers does not know; give the "
            "config.json of a model that it has"
        )
    try:
        config = AutoConfig.for_model(kind, **fields)
        _adapt(config, vocab_size, dropout)
    except Exception as error:
        # A stranger's fields raise whatever their reader happens to meet; each means that the file can't be used.
        raise InputError(f"model.config {path!r}: can't be read ({reason(error)}); correct the file") from None
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and settings.context_length > longest:
        raise InputError(
            f"model.context_length is {settings.context_length}: {path!r} has {longest} positions; give at most that"
        )
    return config


def digest_of(path: str) -> str:
    """Digest of what is in the file, for what is trained with it.

    Raises:
        InputError: it can't be read, or asks for code of its own.
    """
    return digest_json(_read(path))


def reason(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _read(path: str) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file() or file.stat().st_size > _LARGEST_BYTES:
        raise InputError(f"model.config {path!r}: no such file of at most 1 MiB; give a Hugging Face config.json")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no JSON"
        raise InputError(f"model.config {path!r}: can't be read ({why}); give a Hugging Face config.json") from None
    if not isinstance(fields, dict):
        raise InputError(f"model.config {path!r}: it is no JSON object; give a Hugging Face config.json")
    if "auto_map" in fields:
        raise InputError(
            f"model.config {path!r}: auto_map asks for code of the model's own, which is never run; give a model that "
            "transformers itself has"
        )
    # What a file says of weights, or of how they are loaded, is not about a new model.
    dropped = ("architectures", "quantization_config", "torch_dtype", "dtype", "attn_implementation", "_name_or_path")
    return {name: value for name, value in fields.items() if name not in dropped}


def _adapt(config: Any, vocab_size: int, dropout: float) -> None:
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if "drop" in name and isinstance(value, float) and not isinstance(value, bool):
                setattr(part, name, dropout)
        part.vocab_size, part.use_cache = vocab_size, False
        part.bos_token_id = part.eos_token_id = part.pad_token_id = 0
        if part.is_encoder_decoder:
            part.decoder_start_token_id = 0


def require_forward(model: Any, settings: ModelSettings, objective: Objective) -> None:
    """Tries a new model on made-up tokens: a whole sequence goes through it, and a decoder sees no later token.

    Raises:
        InputError: it does not, or it does.
    """
    import torch

    ids_BT = torch.randint(2, (1, settings.context_length), generator=torch.Generator().manual_seed(0))
    halves = [ids_BT, ids_BT[:, : settings.context_length // 2]]
    training = model.training
    try:
        with torch.no_grad():
            whole_TV, half_TV = (_logits(model.eval(), ids, objective) for ids in halves)
    except Exception as error:
        raise InputError(
            f"model.config {settings.config!r}: {settings.context_length} tokens don't go through the model "
            f"({reason(error)}); lower model.context_length, or give another architecture"
        ) from None
    model.train(training)
    # Later tokens that are seen move logits by far more than another order of additions does.
    if objective == "causal" and not (whole_TV[: len(half_TV)] - half_TV).abs().max() <= _ROUNDING * half_TV.std():
        raise InputError(
            f"model.config {settings.config!r}: a token sees those that follow it, so pretrain.objective 'causal' asks "
            "nothing; give 'masked', or the configuration of a decoder"
        )


def _logits(model: Any, ids_BT: torch.Tensor, objective: Objective) -> torch.Tensor:
    given = {"decoder_input_ids": ids_BT} if objective == "span_corruption" else {}
    logits_TV: torch.Tensor = model(input_ids=ids_BT, **given).logits[0]
    return logits_TV
