"""A federation's final model, and its publication: the shared adapter as a peft directory, and the manifest."""

from pathlib import Path
from typing import Any

import torch

from configs.artifacts import Manifest, commit_manifest, require_manifest
from configs.encryption import load_key, sealing
from configs.load import config_digest
from configs.schema import RunConfig
from federated import commits
from federated.adapters import from_bytes
from federated.warm_model import warm_model
from trainer.models import load_adapter_weights


def final_model(config: RunConfig, base_model: Path, federation: Path) -> Any:
    """The base model with the adapter of the federation's last committed round."""
    federated, key_file = config.federated, config.run.encryption_key_file
    model = warm_model(base_model, federated.lora_rank, federated.lora_alpha, key_file)
    adapter = from_bytes(commits.all_rounds(federation, load_key(key_file))[-1].adapter)
    load_adapter_weights(model, {name: torch.from_numpy(array) for name, array in adapter.items()})
    return model.eval()


def publish(config: RunConfig, base_model: Path, federation: Path, kind: str) -> None:
    """Writes a finished federation's adapter and manifest, by which later stages know it."""
    save_peft(config, base_model, federation)
    model = require_manifest(base_model, "model", "export").content_digest
    commit_manifest(federation, Manifest(kind, config_digest(config), inputs={"model": model}))


def save_peft(config: RunConfig, base_model: Path, federation: Path) -> None:
    """Writes the last round's adapter to ``adapter/``, as peft's ``PeftModel.from_pretrained`` loads it.

    Where the run is encrypted its weights are, too: ``siloweave decrypt`` writes a copy in the clear.
    """
    model = final_model(config, base_model, federation)
    model.peft_config["default"].base_model_name_or_path = "../../model"
    key = load_key(config.run.encryption_key_file)
    with sealing(federation / "adapter", key, f"{federation.name}/adapter") as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
