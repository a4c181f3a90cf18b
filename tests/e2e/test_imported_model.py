"""A run whose base model others have made, on labelled records: no public corpus, and the same certificate."""

import json
import shutil
from itertools import islice

from transformers import AutoModelForSequenceClassification

from configs.parse import PRESETS
from configs.storage.manifests import read_manifest
from privacy.declaration import declared_by
from trainer.data.embedded import plays

COLUMNS = 'columns = { label = "kind" }\nlabels = { asks = "a question" }'
LABELLED = """[federated]
task = "classification"
labels = ["a question", "a statement"]
rounds = 1
"""


def labelled(path):
    """Speeches, by whether they ask something."""
    with path.open("w") as file:
        for row in islice(plays(), 0, None, 9):
            kind = "asks" if "?" in row["text"] else "a statement"
            file.write(json.dumps({"silo": row["silo"], "speech": row["text"], "kind": kind}) + "\n")


def test_a_base_model_of_others_is_fine_tuned_and_declared(tiny_model, siloweave, tmp_path):
    labelled(tmp_path / "speeches.jsonl")
    theirs = shutil.copytree(tiny_model, tmp_path / "theirs", ignore=shutil.ignore_patterns("manifest.json"))
    settings = (PRESETS / "tiny.toml").read_text().replace('[data.public]\nsource = "embedded:python-docs"\n', "")
    settings = settings.replace("[federated]\nrounds = 2\n", LABELLED)
    settings = settings.replace('"embedded:plays"', '"speeches.jsonl"\ntext = "speech"\n' + COLUMNS)
    settings = settings.replace("[model]", '[model]\nsource = "theirs"').replace('name = "tiny"', 'name = "brought"')
    (tmp_path / "mine.toml").write_text(settings)
    given = ("-c", "mine.toml", "--set", "evaluate.without_dp=false", "--set", "privacy.evaluations=1")
    given += ("--set", "federated.augmentation.dropout=0.1")
    plan = json.loads(siloweave("plan", *given, "--json", cwd=tmp_path).stdout)
    assert (plan["model"]["source"], plan["pretrain"]) == (str(theirs), None)
    for stage in ("prepare", "pretrain", "export"):
        refused = siloweave(stage, *given, cwd=tmp_path)
        assert refused.returncode == 2
        assert "the base model is not trained here; run `siloweave import`" in refused.stderr
    done = siloweave("demo", *given, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report, run = json.loads(done.stdout), tmp_path / "runs" / "brought"
    key = declared_by(run / "model", read_manifest(run / "model", "model"))
    assert key
    assert (report["pretrain"], report["model"]["declared_public_by"]) == (None, key)
    assert f"made elsewhere, declared public by\n    <code>{key}</code>" in (run / "report.html").read_text()
    federated = report["federated"]
    assert (federated["metric"], report["sample"]) == ("accuracy", "")
    assert 0 < federated["accuracy_dp"] <= 1
    assert set(federated["private_evaluation"][0]["f1_by_label"]) == {"a question", "a statement"}
    assert "this model writes no text" in done.stderr
    merged = siloweave("merge", str(run), cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr
    whole = AutoModelForSequenceClassification.from_pretrained(run / "merged")
    assert whole.config.id2label == {0: "a question", 1: "a statement"}
    certificate = run / "federated" / "certificate.json"
    assert json.loads(certificate.read_text())["model"]["declared_public_by"] == key
    verify = ("ledger", "verify", "--certificate", str(certificate), "--model", str(run / "model"))
    assert "is the certificate's base model" in siloweave(*verify, cwd=tmp_path).stdout
    stages = json.loads(siloweave("status", *given, "--json", cwd=tmp_path).stdout)["stages"]
    assert list(stages)[:2] == ["import", "federated"]
    assert {stage["state"] for stage in stages.values()} == {"done"}
    audit = siloweave("audit", *given, cwd=tmp_path)
    assert (audit.returncode, "data.public: missing; an audit trains on public text" in audit.stderr) == (2, True)
