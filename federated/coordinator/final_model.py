"""A federation's final model, and its publication: the shared adapter, or the whole model, and the manifest."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.run_directory import config_digest
from configs.schema.schema import RunConfig
from configs.storage.files import write_atomic
from configs.storage.manifests import Manifest, commit_manifest, require_manifest
from configs.storage.sealing import load_key, sealing
from federated.adapters.arrays import from_bytes
from federated.adapters.merged import ADAPTER, WHOLE, write_model
from federated.adapters.warm_model import adaptation_for, put_on, warm_model
from federated.coordinator import round_commits as commits
from privacy.certificate.model_digests import published_digests

_HEADS = {
    ADAPTER: "---\nbase_model: ../../model\nlibrary_name: peft\n---\n\n# LoRA adapter\n\n",
    WHOLE: "---\nbase_model: ../../model\nlibrary_name: transformers\n---\n\n# Fine-tuned model\n\n",
}
_WITHOUT_DP = "Trained WITHOUT differential privacy, for comparison on public data. No certificate speaks of it.\n"


def final_model(config: RunConfig, base_model: Path, federation: Path) -> Any:
    """The base model with what the federation's last committed round has left."""
    key_file = config.run.encryption_key_file
    model = warm_model(base_model, adaptation_for(config, base_model), key_file)
    adapter = from_bytes(commits.all_rounds(federation, load_key(key_file))[-1].adapter)
    put_on(model, adapter)
    return model.eval()


def publish(config: RunConfig, base_model: Path, federation: Path, kind: str) -> None:
    """Writes the manifest of a finished federation, by which later stages know it."""
    model = require_manifest(base_model, "model", config.model.made_by).content_digest
    head = adaptation_for(config, base_model).head
    metadata = {"head": asdict(head)} if head else {}
    commit_manifest(federation, Manifest(kind, config_digest(config), inputs={"model": model}, metadata=metadata))


def published(config: RunConfig) -> str:
    """The folder of a federation that holds what it has made."""
    return ADAPTER if config.federated.train == "lora" else WHOLE


def save_final(config: RunConfig, base_model: Path, federation: Path) -> dict[str, str]:
    """Writes the last round's adapter to ``adapter/``, as peft's ``PeftModel.from_pretrained`` loads it.

    Where parameters of the model itself have trained, the whole of it goes to ``model/``, as ``from_pretrained`` of
    transformers loads it. Where the run is encrypted the weights are, too: ``siloweave decrypt`` writes a copy in the
    clear.

    Returns:
        Digests of its files in the clear.
    """
    model, name = final_model(config, base_model, federation), published(config)
    with sealing(federation / name, load_key(config.run.encryption_key_file), f"{federation.name}/{name}") as folder:
        if name == WHOLE:
            write_model(model, base_model, folder)
        else:
            model.peft_config["default"].base_model_name_or_path = "../../model"
            model.save_pretrained(folder, save_embedding_layers=False)
        return published_digests(folder)


def write_card(config: RunConfig, federation: Path, certificate: dict[str, Any] | None) -> None:
    """Writes the model card: which certificate is about what lies there, and how anybody can check that."""
    text, name = _WITHOUT_DP if certificate is None else _certified(certificate), published(config)
    write_atomic(federation / name / "README.md", f"{_HEADS[name]}{text}".encode())


def _certified(certificate: dict[str, Any]) -> str:
    claim, model = certificate["headline"], certificate["model"]
    digests = "\n".join(f"| `{name}` | `{digest}` |" for name, digest in sorted(model["adapter"].items()))
    return f"""
Trained in run `{certificate["run_id"]}` with epsilon {claim["epsilon"]:.4g} at delta {claim["delta"]:g} for one
{certificate["unit"]} ({claim["rule"]}). `../certificate.json` says what that rests on and what it does not cover; it is
about the files with these SHA-256 digests, and about the base model with the content digest
`{model["base_model"]}`:

| file, in the clear | SHA-256 |
|---|---|
{digests}

`siloweave ledger verify --certificate ../certificate.json --model .` checks both the claim and that this is the model.
"""
