"""What a federation has made as one plain model, base and adapter in the same weights: it needs neither us nor peft."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from configs.errors import InputError, lines_of
from configs.storage.files import digest_file, whole_folder
from configs.storage.layout import CALIBRATION, CERTIFICATE, FEDERATED, NO_DP, RunFiles
from configs.storage.manifests import MANIFEST, Manifest, commit_manifest, require_manifest
from configs.storage.sealing import MasterKey, opened, sealing
from privacy.declaration import DECLARATION
from trainer.models.adapters import shapes
from trainer.models.load import Head, load_model

ADAPTER, WHOLE = "adapter", "model"  # what a federation publishes: an adapter, or the whole model where that trained
_LORA, _CONFIG = "adapter_config.json", "config.json"
# No part of what was made of it.
_OF_THE_BASE = {_CONFIG, "generation_config.json", "README.md", MANIFEST, DECLARATION, CALIBRATION}
_CARD = """---
base_model: ../model
library_name: transformers
---
# Merged model

The base model with a federation's adapter added to its weights. `manifest.json` names both by their digests, which are
those in `certificate.json`, where that lies here: it says what this model's privacy rests on.
"""


def with_shared(base: Any, shared: Path, key: MasterKey | None = None, context: str = "") -> Any:
    """The base model as a federation has left it, in evaluation mode: one plain model.

    Args:
        base: the base model; it is changed.
        shared: what the federation has published: an adapter's folder, or a whole model's.
        key: of an encrypted folder.
        context: what it was encrypted as.

    Raises:
        InputError: it is neither, encrypted without a key, damaged, or of another model.
    """
    from peft import PeftModel

    whole = (shared / _CONFIG).is_file()
    if not whole and not (shared / _LORA).is_file():
        raise InputError(f"{shared}: holds no {_LORA}; give the adapter/ folder that the federation wrote")
    with opened(shared, key, context) as folder:
        try:
            if not whole:
                return PeftModel.from_pretrained(base, folder, local_files_only=True).merge_and_unload().eval()
            found = load_model(folder)
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            reason = lines_of(error)[0]
            raise InputError(f"{shared}: is no adapter of this base model ({reason}); give the right folder") from None
    if shapes(dict(found.named_parameters())) != shapes(dict(base.named_parameters())):
        raise InputError(f"{shared}: is a model of other shapes than this base model; give the right folder")
    return found


def merge(place: Path, output: Path | None, key: MasterKey | None) -> tuple[Path, Manifest]:
    """Writes a federation's model merged: safetensors, configuration, tokenizer, card, certificate, manifest.

    Args:
        place: a run's directory, or the folder of an adapter in one.
        output: where to write; None: ``merged/`` in the run's directory.
        key: of an encrypted run; then the merged weights are encrypted, too.

    Returns:
        Where it lies, and its manifest.

    Raises:
        InputError: there is no finished federation, it is of another base model, its key is missing, something else
            lies where the result should be, or the whole model was trained.
        SiloweaveError: the disk is full or not writable.
    """
    federation, _, base, _ = found = finished_federation(place)
    if (federation / WHOLE).is_dir():
        raise InputError(f"{federation / WHOLE}: the whole model was trained, so nothing has to be merged; take this")
    target = output or base.parent / stage_of(federation).replace(FEDERATED, "merged")
    if target.exists():
        raise InputError(f"{target}: exists; give a path where nothing is yet, by --output")
    model, inputs = plain_model(*found, key)
    return target, write_whole(model, base, federation, target, key, inputs, {"README.md": _CARD})


def plain_model(
    federation: Path, made: Manifest, base: Path, manifest: Manifest, key: MasterKey | None
) -> tuple[Any, dict[str, str]]:
    """A federation's model without peft, and the digests of what it was made of, by the names of a merged manifest.

    Args:
        federation: its folder; like the three that follow as ``finished_federation`` gives them.
        made: its manifest.
        base: the base model's folder.
        manifest: the base model's.
        key: of an encrypted run.

    Raises:
        InputError: the key is missing, or what lies there is of another base model.
    """
    shared = WHOLE if (federation / WHOLE).is_dir() else ADAPTER
    with opened(federation / shared, key, f"{stage_of(federation)}/{shared}") as folder:
        names = [_LORA, "adapter_model.safetensors"]
        if shared == WHOLE:  # of which a certificate names all that a reader loads
            names = sorted(path.name for path in folder.iterdir() if path.name not in ("README.md", MANIFEST))
        digests = {f"{ADAPTER}/{name}": digest_file(folder / name) for name in names}  # the certificate's word for both
        model = with_shared(load_model(base, key, head_of(made)), folder)
    return model, {"model": manifest.content_digest, **digests}


def finished_federation(place: Path) -> tuple[Path, Manifest, Path, Manifest]:
    """A federation that has ended, and the base model that it started from.

    Args:
        place: a run's directory, a federation's folder in one, or the folder of an adapter or a whole model in that.

    Returns:
        The federation's folder and manifest, and the base model's.

    Raises:
        InputError: there is no finished federation, or it is of another base model.
    """
    inside = place / FEDERATED
    federation = place.parent if place.name in (ADAPTER, WHOLE) else inside if inside.is_dir() else place
    made = require_manifest(federation, stage_of(federation), "federate")
    base = RunFiles(federation.resolve().parent).model
    manifest = require_manifest(base, WHOLE, "export")
    if made.inputs.get("model") != manifest.content_digest:
        raise InputError(
            f"{federation / ADAPTER}: is of the base model {made.inputs.get('model', 'none')[:16]}…, and {base} is "
            f"{manifest.content_digest[:16]}…; put the right base model back"
        )
    return federation, made, base, manifest


def head_of(made: Manifest) -> Head | None:
    """What the federation's task has put on the base model."""
    said = made.metadata.get("head")
    return Head(**{**said, "labels": tuple(said["labels"])}) if said else None


def stage_of(federation: Path) -> str:
    """The stage that made a federation's folder: with DP or without."""
    return NO_DP if federation.resolve().name == NO_DP else FEDERATED


def write_whole(
    model: Any,
    base: Path,
    made: Path,
    target: Path,
    key: MasterKey | None,
    inputs: dict[str, str],
    texts: Mapping[str, str],
) -> Manifest:
    """Writes a model that stands for itself; its folder is there whole or not at all.

    Args:
        model: a plain one.
        base: the folder of its tokenizer, chat template and licence.
        made: the folder where a certificate may lie, which comes along.
        target: where nothing is yet.
        key: encrypts the weights.
        inputs: digests of what the model was made from.
        texts: further files by their names.

    Raises:
        SiloweaveError: the disk is full or not writable.
    """
    with whole_folder(target) as part:
        with sealing(part, key, f"{target.name}/{WHOLE}") as folder:
            write_model(model, base, folder)
        for name, text in texts.items():
            (part / name).write_text(text, encoding="utf-8")
        if (made / CERTIFICATE).is_file():
            shutil.copyfile(made / CERTIFICATE, part / CERTIFICATE)
        parameters = sum(value.numel() for value in model.parameters())
        return commit_manifest(part, Manifest("merged", "", inputs=inputs, metadata={"parameters": parameters}))


def write_model(model: Any, base: Path, folder: Path) -> None:
    """Writes a model that was made of a base model, with that one's tokenizer, chat template and licence."""
    copy_of_base(base, folder)
    model.save_pretrained(folder, max_shard_size="1TB")  # one file, which a certificate can name


def copy_of_base(base: Path, folder: Path) -> None:
    """A base model's tokenizer, chat template and licence, for a model that was made of it."""
    for path in base.iterdir():
        if path.is_file() and path.name not in _OF_THE_BASE and path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
