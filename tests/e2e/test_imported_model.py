"""A run whose base model others have made: no public corpus, no pretraining, and the same certificate."""

import json
import shutil

from configs.parse import PRESETS
from configs.storage.manifests import read_manifest
from privacy.declaration import declared_by


def test_a_base_model_of_others_is_fine_tuned_and_declared(tiny_model, siloweave, tmp_path):
    theirs = shutil.copytree(tiny_model, tmp_path / "theirs", ignore=shutil.ignore_patterns("manifest.json"))
    settings = (PRESETS / "tiny.toml").read_text().replace('[data.public]\nsource = "embedded:python-docs"\n', "")
    settings = settings.replace("[model]", '[model]\nsource = "theirs"').replace('name = "tiny"', 'name = "brought"')
    (tmp_path / "mine.toml").write_text(settings)
    given = ("-c", "mine.toml", "--set", "federated.rounds=1", "--set", "evaluate.without_dp=false")
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
    certificate = run / "federated" / "certificate.json"
    assert json.loads(certificate.read_text())["model"]["declared_public_by"] == key
    verify = ("ledger", "verify", "--certificate", str(certificate), "--model", str(run / "model"))
    assert "is the certificate's base model" in siloweave(*verify, cwd=tmp_path).stdout
    stages = json.loads(siloweave("status", *given, "--json", cwd=tmp_path).stdout)["stages"]
    assert list(stages)[:2] == ["import", "federated"]
    assert {stage["state"] for stage in stages.values()} == {"done"}
    audit = siloweave("audit", *given, cwd=tmp_path)
    assert (audit.returncode, "data.public: missing; an audit trains on public text" in audit.stderr) == (2, True)
