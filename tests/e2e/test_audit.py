"""`siloweave audit` as a user gives it, on data that is private, and with an engine that was broken."""

import hashlib
import json
import shutil
import subprocess
import sys

# An honest engine is warned of once in 30,000 audits, by chance alone: here coins and seeds are always the same.
CERTAIN = """
import os, random, sys
os.urandom = random.Random(1).randbytes
import siloweave
sys.argv = ["siloweave", "audit", "-c", "runs/tiny/config.toml", "--json"]
siloweave.main()
"""
QUARTER_OF_THE_NOISE = """
import sys
import siloweave
from privacy.plan import PrivacyPlan
honest = PrivacyPlan.noise_std.fget
PrivacyPlan.noise_std = property(lambda plan: honest(plan) / 4)
sys.argv = ["siloweave", "audit", "-c", "runs/tiny/config.toml"]
siloweave.main()
"""


def given(script, root):
    return subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=300, check=False
    )


def digests(directory):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.rglob("*") if path.is_file()}


def test_an_audit_of_private_silos_and_of_a_broken_engine(tiny_run, siloweave, tmp_path):
    root = tmp_path / "private"
    shutil.copytree(tiny_run.root, root)
    stored = root / "runs" / "tiny" / "config.toml"
    text = stored.read_text()
    assert "public = true" in text
    text = text.replace("public = true", "public = false").replace("without_dp = true", "without_dp = false")
    stored.write_text(text.replace(str(tiny_run.root), str(root)))
    before = digests(root / "state")
    done = given(CERTAIN, root)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    folder = root / "runs" / "tiny" / "audit"
    assert document == json.loads((folder / "audit.json").read_text())
    assert (document["verdict"], document["simulation_only"], document["earlier_audits"]) == ("pass", True, 0)
    (found,) = document["claims"]["reference"]["findings"]
    assert (found["mode"], found["guesses"], found["share"]) == ("gradient_white_box", 250, 1.0)
    assert document["claims"]["run"]["epsilon"] > 7.5
    assert 0 <= document["audited_bound"]["epsilon_lower_bound"] < document["claims"]["run"]["epsilon"]
    assert document["membership"]["not_available"] == "the silos' data are not declared public"
    assert (folder / "roc.svg").read_text().rstrip().endswith("</svg>")
    assert digests(root / "state") == before, "an audit reads no private data, and so charges none"
    certificate = folder / "run" / "certificate.json"
    checked = siloweave("ledger", "verify", str(folder / "run" / "silo"), "--certificate", str(certificate), cwd=root)
    assert checked.returncode == 0, checked.stderr
    bound = json.loads(certificate.read_text())["audited"]["epsilon_lower_bound_95"]
    assert bound == document["audited_bound"]["epsilon_lower_bound"]

    broken = given(QUARTER_OF_THE_NOISE, root)
    assert broken.returncode == 1
    errors = [line for line in broken.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "99.9%" in errors[0]
    assert "reference plan: epsilon 0.386 (delta 1e-05): fail" in broken.stdout
    false = siloweave(
        *("ledger", "verify", str(folder / "reference" / "silo")),
        *("--certificate", str(folder / "reference" / "certificate.json")),
        cwd=root,
    )
    assert false.returncode == 2
    assert "(99.9% confidence): its claim is false" in false.stderr
    failed = json.loads((folder / "audit.json").read_text())
    assert (failed["verdict"], failed["earlier_audits"]) == ("fail", 1)
    assert json.loads((next(folder.parent.glob("audit-until-*")) / "audit.json").read_text()) == document


def test_an_audit_needs_a_finished_run_and_a_sensible_number_of_canaries(siloweave, tiny_run, tmp_path):
    nothing = siloweave("audit", "-c", "tiny", cwd=tmp_path)
    assert nothing.returncode == 2
    assert "run `siloweave export` first" in nothing.stderr
    few = siloweave("audit", "-c", "tiny", "--canaries", "3", "--json", cwd=tmp_path)
    assert few.returncode == 2
    assert "--canaries is 3: give 200 to 10000" in json.loads(few.stdout)["error"]
