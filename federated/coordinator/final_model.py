"""What a federation starts from, its final model, and that one's publication: adapter or whole model, and manifest."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.parse import parse, read_toml
from configs.run_directory import config_digest
from configs.schema.federated import FederatedSettings
from configs.schema.schema import RunConfig
from configs.schema.tasks import WRITES
from configs.storage.files import write_atomic
from configs.storage.layout import EARLIER_CERTIFICATE, FEDERATED, RunFiles
from configs.storage.manifests import Manifest, commit_manifest, require_manifest
from configs.storage.sealing import load_key, sealing
from federated.adapters.arrays import Arrays, from_bytes
from federated.adapters.lora_factors import frozen_digest
from federated.adapters.merged import ADAPTER, WHOLE, write_model
from federated.adapters.warm_model import adaptation_for, initial_adapter, put_on, warm_model
from federated.coordinator import round_commits as commits
from privacy.certificate.model_digests import published_digests

_HEADS = {
    ADAPTER: "---\nbase_model: ../../model\nlibrary_name: peft\n---\n\n# LoRA adapter\n\n",
    WHOLE: "---\nbase_model: ../../model\nlibrary_name: transformers\n---\n\n# Fine-tuned model\n\n",
}
_MEANING = ("task", "train", "lora_alpha", "pooling", "labels")  # of the same numbers
_WITHOUT_DP = "Trained WITHOUT differential privacy, for comparison on public data. No certificate speaks of it.\n"


def start(config: RunConfig, base_model: Path, federation: Path) -> Arrays:
    """What travels before the first round: of a federation that continues an earlier one, what that one has made.

    The earlier one's certificate is laid into this federation's folder: what is made here rests on it, too.

    Raises:
        AdaptationError: the base model hasn't got what is to train.
        InputError: the earlier run is unfinished, has no certificate, or is of another base model or of other settings.
    """
    fresh = initial_adapter(config, base_model)
    if not config.federated.continue_from:
        (federation / EARLIER_CERTIFICATE).unlink(missing_ok=True)  # of a start with other settings, which made nothing
        return fresh
    earlier = RunFiles(Path(config.federated.continue_from))
    _require_alike(config, base_model, earlier)
    key = load_key(config.run.encryption_key_file)
    adapter = from_bytes(commits.all_rounds(earlier.federated, key)[-1].adapter)
    if _sizes(adapter) != _sizes(fresh):
        raise _other(config, "other names or shapes than this run's adapter; give the same [federated] as there")
    if config.federated.adapters == "ffa" and frozen_digest(adapter) != frozen_digest(fresh):
        raise _other(config, "another frozen A; give the run.seed that it was made with")
    write_atomic(federation / EARLIER_CERTIFICATE, earlier.certificate.read_bytes())
    return adapter


def _require_alike(config: RunConfig, base_model: Path, earlier: RunFiles) -> None:
    """What shapes alone would not show: the same values would mean something else."""
    made = require_manifest(earlier.federated, FEDERATED, "federate")
    base = require_manifest(earlier.model, "model", "export")
    if not earlier.certificate.is_file():
        raise _other(config, f"no {earlier.certificate.name}; give a run whose federation ended under DP")
    own = require_manifest(base_model, "model", config.model.made_by)
    if made.inputs.get("model") != base.content_digest or _weights(base) != _weights(own):
        raise _other(config, "a base model of other weights; give a run of this one, or this run that base model")
    before = parse(FederatedSettings, read_toml(earlier.config).get("federated", {}), str(earlier.config))
    for name, theirs, ours in zip(_MEANING, _meaning(before), _meaning(config.federated), strict=True):
        if theirs != ours:
            raise _other(config, f"federated.{name} {theirs!r}, and here it is {ours!r}; give the same")


def _weights(model: Manifest) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in model.files.items() if name.endswith(".safetensors")}


def _meaning(settings: FederatedSettings) -> tuple[Any, ...]:
    """By which tasks a head is another one; those that write have none."""
    task = "one that writes" if settings.task in WRITES else settings.task
    return task, settings.train, settings.lora_alpha, settings.pooling, settings.labels


def _sizes(adapter: Arrays) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in adapter.items()}


def _other(config: RunConfig, what: str) -> InputError:
    return InputError(f"federated.continue_from {config.federated.continue_from!r}: that run has {what}")


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
    earlier = model.get("continues")
    continued = (
        f"\nIt starts from what an earlier run has made. What that one spent is in `../{EARLIER_CERTIFICATE}` (SHA-256 "
        f"`{earlier}`),\nand comes on top for whoever was in both.\n"
        if earlier
        else ""
    )
    digests = "\n".join(f"| `{name}` | `{digest}` |" for name, digest in sorted(model["adapter"].items()))
    if any("updates" in one for one in model["rounds"]):
        continued += (
            "\nIts steps were buffered: each was taken when enough updates had come. `../certificate.json` has them\n"
            "in that order (`model.rounds`), each with the step that its model came from and its weight.\n"
        )
    return f"""
Trained in run `{certificate["run_id"]}` with epsilon {claim["epsilon"]:.4g} at delta {claim["delta"]:g} for one
{certificate["unit"]} ({claim["rule"]}). `../certificate.json` says what that rests on and what it does not cover; it is
about the files with these SHA-256 digests, and about the base model with the content digest
`{model["base_model"]}`:
{continued}
| file, in the clear | SHA-256 |
|---|---|
{digests}

`siloweave ledger verify --certificate ../certificate.json --model .` checks both the claim and that this is the model.
"""
