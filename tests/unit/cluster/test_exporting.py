"""A finished encoder as an ONNX folder: the same logits in another runtime, and what leads back to its run."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import served_models
import torch
from served_models import a_federation, a_labelling_run, a_model
from tiny_bert import CONTEXT, base_model, published
from transformers import AutoTokenizer

from cluster.exporting import ONNX, export_onnx
from cluster.finished import finished_model
from configs.errors import InputError, SiloweaveError
from configs.load import load
from configs.run_directory import to_toml
from configs.storage.files import digest_file
from configs.storage.layout import CERTIFICATE
from configs.storage.manifests import MANIFEST, require_manifest
from federated.adapters.merged import merge
from trainer.optimisation import onnx_file

TEXTS = [f"the {name} ship sails to island number {number}" for number in range(40) for name in ("red", "old")]
LABELS = ("bad", "good", "neither")
LABELS_OF = {"classification": LABELS, "qa": ()}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    return base_model(folder, published(folder / "published", TEXTS))


def shorter(run):
    """The context is this BERT's own."""
    path = run / "config.toml"
    path.write_text(
        path.read_text().replace(f"context_length = {served_models.CONTEXT}", f"context_length = {CONTEXT}")
    )


def of_pairs(name, tokenizer):
    pairs = ("which ship?", "the red ship sails to island 7"), ("where", "the old one"), ("a", "b")
    given = (list(side) for side in zip(*pairs, strict=True)) if name == "qa" else ([" ".join(pair) for pair in pairs],)
    return tokenizer(*given, padding=True, return_tensors="np", return_token_type_ids=True)


@pytest.mark.parametrize("name", ["classification", "qa"])
def test_another_runtime_gives_the_same_logits_and_the_manifest_leads_back(name, base, tmp_path):
    run, *_ = a_labelling_run(tmp_path / "run", base, name, LABELS_OF[name])
    shorter(run)
    certificate = run / "federated" / CERTIFICATE
    certificate.write_text(json.dumps({"headline": {"epsilon": 2.0, "delta": 1e-5}, "unit": "record"}))
    merged, made = merge(run, None, None)
    output = tmp_path / "onnx"
    found = finished_model(merged)
    manifest = export_onnx(found, output)

    read = dict(of_pairs(name, AutoTokenizer.from_pretrained(output)))  # what lies there is enough to ask it
    session = onnxruntime.InferenceSession(str(output / ONNX), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    assert names == ["input_ids", "attention_mask", *(["token_type_ids"] if name == "qa" else [])]
    with torch.no_grad():  # as transformers has it
        expected = found.model(**{key: torch.from_numpy(read[key]) for key in names})
    for row in ([0, 1, 2], [1]):
        given = {key: read[key][row] for key in names}
        for output_name, value in zip(manifest.metadata["outputs"], session.run(None, given), strict=True):
            assert np.abs(value - expected[output_name].numpy()[row]).max() < TOLERANCE
    assert float(expected[0].std()) > 100 * TOLERANCE  # or any answer would do

    assert require_manifest(output, "onnx", "onnx").content_digest == manifest.content_digest
    assert manifest.inputs["model"] == require_manifest(run / "model", "model", "export").content_digest
    assert manifest.inputs == {**made.inputs, "merged": made.content_digest, "certificate": digest_file(certificate)}
    assert (output / CERTIFICATE).read_bytes() == certificate.read_bytes()
    assert "epsilon 2 at delta 1e-05" in (output / "README.md").read_text()
    assert json.loads((output / MANIFEST).read_text())["metadata"]["largest_difference"] < TOLERANCE
    content = (output / ONNX).read_bytes()
    assert not [word for word in (b"site-packages", b".py", str(tmp_path).encode()) if word in content]


class Broken:
    """Stands for a file that torch has written and onnxruntime doesn't take."""

    @staticmethod
    def save(path, **_):
        Path(path).write_bytes(b"no model")


def test_what_can_not_be_written_is_refused_and_leaves_nothing(base, tmp_path, monkeypatch):
    run, *_ = a_labelling_run(tmp_path / "run", base, "classification", LABELS)
    found = finished_model(merge(run, None, None)[0])
    monkeypatch.setattr(onnx_file, "_program", lambda *_: (_ for _ in ()).throw(ModuleNotFoundError(name="onnxscript")))
    with pytest.raises(InputError, match=r"onnxscript is not installed; `pip install 'siloweave\[onnx\]'`"):
        export_onnx(found, tmp_path / "onnx")
    monkeypatch.setattr(onnx_file, "_program", lambda *_: Broken)
    with pytest.raises(SiloweaveError, match=r"onnxruntime can't run the file \(.*\); it is not kept") as refusal:
        export_onnx(found, tmp_path / "onnx")
    assert "\n" not in str(refusal.value)
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="there: exists; give a path"):
        export_onnx(found, tmp_path / "there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "there"]


def test_a_model_that_writes_is_refused(tmp_path):
    run = a_federation(tmp_path / "run", a_model(tmp_path / "base"), 1)
    (run / "config.toml").write_text(to_toml(load("tiny")))
    with pytest.raises(InputError, match="writes, and has no head"):
        export_onnx(finished_model(merge(run, None, None)[0]), tmp_path / "onnx")
