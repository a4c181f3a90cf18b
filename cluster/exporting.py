"""A finished model with a head as an ONNX folder, with what leads back to the run that made it."""

import json
import shutil
from pathlib import Path

from cluster.finished import Finished
from cluster.optimising import origin, plain, refuse_existing
from configs.errors import InputError
from configs.storage.files import whole_folder
from configs.storage.layout import CERTIFICATE
from configs.storage.manifests import Manifest, commit_manifest
from configs.storage.sealing import load_key
from federated.adapters.merged import copy_of_base
from trainer.models.load import is_quantised
from trainer.optimisation.onnx_file import write_onnx

ONNX = "model.onnx"
_CARD = """---
library_name: onnx
---
# A federation's model for ONNX runtimes

{privacy}

`{file}` reads {inputs}, each (texts, tokens) of int64, at least two tokens long, and gives {outputs}. The tokenizer is
the one beside it. Logits are those of the model up to {difference:.1g} here. Numbers stand for: {labels}.

`manifest.json` names by their digests what the model was made from, as `certificate.json` does, where that lies here.
"""


def export_onnx(found: Finished, output: Path) -> Manifest:
    """Writes a model as ONNX; its folder is there whole or not at all.

    Args:
        found: the model; of a task with a head of its own.
        output: where nothing is yet.

    Raises:
        InputError: the output exists, the model writes, is quantised, encrypted or an encoder-decoder, or can't be
            exported.
        SiloweaveError: the file answers otherwise than the model, or the disk is full or not writable.
    """
    refuse_existing(output)
    _refuse(found)
    model, base, inputs = plain(found, None)
    with whole_folder(output) as part:
        copy_of_base(base, part)
        facts = write_onnx(model, found.task, part / ONNX)
        (part / "README.md").write_text(_card(found, facts), encoding="utf-8")
        (part / "labels.json").write_text(json.dumps(list(found.task.head.labels)) + "\n", encoding="utf-8")
        if (found.made / CERTIFICATE).is_file():
            shutil.copyfile(found.made / CERTIFICATE, part / CERTIFICATE)
        metadata = {
            **facts,
            "context_length": found.task.context_length,
            "privacy": found.privacy.partition(", by ")[0],
        }
        return commit_manifest(part, Manifest("onnx", "", inputs={**inputs, **origin(found)}, metadata=metadata))


def _refuse(found: Finished) -> None:
    if found.task.head is None:
        raise InputError(f"{found.made}: writes, and has no head for labels or answers; ONNX is for those that have")
    if load_key(found.config.run.encryption_key_file):
        raise InputError(f"{found.made}: its run is encrypted, and an ONNX file lies in the clear; merge it elsewhere")
    if is_quantised(found.model):
        raise InputError(f"{found.made}: its weights are quantised; give the model that it was made from")
    if found.model.config.is_encoder_decoder:
        raise InputError(f"{found.made}: is an encoder-decoder; ONNX is for encoders and decoders with a head")


def _card(found: Finished, facts: dict[str, object]) -> str:
    return _CARD.format(
        privacy=found.privacy.partition(", by ")[0],
        file=ONNX,
        inputs=", ".join(map(str, facts["inputs"])),  # type: ignore[call-overload]
        outputs=", ".join(map(str, facts["outputs"])),  # type: ignore[call-overload]
        difference=facts["largest_difference"],
        labels=", ".join(found.task.head.labels) or "the first and the last token of an answer",
    )
