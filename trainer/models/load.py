"""Loads a model from where a run, or a person, has put it."""

from pathlib import Path
from typing import Any

import torch

from configs.imports import import_large
from configs.storage.manifests import read_manifest
from configs.storage.sealing import MasterKey, opened
from trainer.models.llama import attention

MODEL = "model"


def load_model(directory: Path, key: MasterKey | None = None) -> Any:
    """The model of an exported directory, float32, in evaluation mode. Reads safetensors only, never pickles.

    Raises:
        InputError: its weights were not written with this key, or were made with other settings than its manifest says.
    """
    import_large("transformers.modeling_utils")
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
