"""Records of a model under DP, and the page that shows what it says: with the certificate of a run that was trained."""

import json
import re

import torch

from cluster.synthesising import Wanted, make
from configs.storage.files import digest_file
from configs.storage.layout import CERTIFICATE
from configs.storage.manifests import require_manifest
from privacy.certificate.check import check_certificate


def test_records_carry_the_guarantee_of_their_model(tiny_run, tmp_path):
    torch.set_num_threads(1)
    before = digest_file(tiny_run.directory / "federated" / CERTIFICATE)
    made = make(tiny_run.directory, Wanted(5, tmp_path / "out" / "speeches.jsonl"))
    records = [json.loads(line) for line in (tmp_path / "out" / "speeches.jsonl").read_text().splitlines()]
    assert len({record["text"] for record in records}) == 5
    claim = json.loads((tmp_path / "out" / CERTIFICATE).read_text())
    check_certificate(claim, "the copy")
    assert digest_file(tmp_path / "out" / CERTIFICATE) == made["privacy"]["certificate"] == before
    assert made["privacy"]["epsilon"] == claim["headline"]["epsilon"]
    federation = require_manifest(tiny_run.directory / "federated", "federated", "federate")
    manifest = require_manifest(tmp_path / "out", "synthetic", "synthesise")
    assert manifest.inputs == {"model": federation.content_digest, "certificate": before}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"**Privacy: epsilon {claim['headline']['epsilon']:.4g} at delta" in card
    assert "NOT PRIVATE" not in card


def test_the_demo_ends_with_a_page_of_what_its_models_say(tiny_run):
    files = tiny_run.directory
    document, page = json.loads((files / "showcase.json").read_text()), (files / "showcase.html").read_text()
    assert document["prompts"] == [tiny_run.config().evaluate.prompt]
    assert set(document["answers"]) == {"base", "dp", "no_dp"}
    # Other tests have more written, over sample.txt.
    assert tiny_run.report["sample"] == "".join([*document["prompts"], *document["answers"]["dp"]])
    assert document["answers"]["base"] != document["answers"]["dp"]
    assert document["privacy"]["certificate"] == digest_file(files / "federated" / CERTIFICATE) in page
    assert [one["text"] for one in document["explanations"]] == document["prompts"]
    assert not re.findall(r'(?:src|href)="(?!report\.html")|@import|url\(', page), "the page asks for another file"
    assert tiny_run.report["showcase"] == "showcase.html"
    assert '<a href="showcase.html">' in (files / "report.html").read_text()
    assert tiny_run.report["seconds"]["show"] >= 0
