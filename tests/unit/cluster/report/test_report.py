"""The report of a run in which some silo, or every one, has no held-out record."""

import json
import shutil

import pytest
from rich.console import Console

from cluster.monitoring.console import figure_tables, result_table
from cluster.report.page import render
from cluster.report.report import build, missing
from configs.errors import InputError
from configs.storage.layout import FEDERATED, RunFiles
from configs.storage.manifests import require_manifest


@pytest.fixture
def run(tiny_run, tmp_path, monkeypatch):
    """A copy of the finished run, to change its figures."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tiny_run.state))  # its ledgers lie there
    shutil.copytree(tiny_run.directory, tmp_path / "tiny", ignore=shutil.ignore_patterns("checkpoints", "corpus"))
    return RunFiles(tmp_path / "tiny")


def evaluation_without(files, names):
    """Takes the held-out records of some silos away; of all, where there is no name."""
    found = json.loads(files.evaluation.read_text())
    for entry in (found["base"], *found["federated"], *found["federated-no-dp"]):
        for name in names or entry["by_silo"]:
            entry["by_silo"][name] = {"bits_per_char": None, "records": 0}
        if not names:
            entry.update(bits_per_char=None, records=0)
            if "in_full" in entry:
                entry["in_full"] = {"records": 0, "units": 0, "figures": {}, "missing": []}
    files.evaluation.write_text(json.dumps(found))


def shown(config, files, capsys):
    report = build(config, files.directory)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    Console(width=200).print(result_table(report))
    return report["federated"], render(report), capsys.readouterr().out


def test_a_silo_without_a_held_out_record_is_not_available_and_the_rest_is_there(tiny_run, run, capsys):
    evaluation_without(run, ["roman"])
    found, page, table = shown(tiny_run.config(), run, capsys)
    figures = {"bits_per_char_base": None, "bits_per_char_dp": None, "bits_per_char_no_dp": None}
    assert found["by_silo"]["roman"] == {"records": 0, **figures}
    assert found["by_silo"]["comedies"] == tiny_run.report["federated"]["by_silo"]["comedies"]
    assert found["improvement_dp"] == tiny_run.report["federated"]["improvement_dp"]
    assert page.count('<td class="n">not available</td>') == 3
    assert "not available" not in table


def test_a_run_without_any_held_out_record_has_its_report(tiny_run, run, capsys):
    evaluation_without(run, [])
    found, page, table = shown(tiny_run.config(), run, capsys)
    assert (found["bits_per_char_dp"], found["improvement_dp"]) == (None, None)
    assert "The federated model is finished" in page
    assert table.count("not available") == 3


def test_the_report_has_the_figures_in_full_with_their_intervals(tiny_run, run, capsys):
    found, page, table = shown(tiny_run.config(), run, capsys)
    for model in ("base", "dp", "no_dp"):
        figures = found["in_full"]["silos"][model]["figures"]["siloweave"]
        assert figures["bits_per_char"]["value"] == pytest.approx(found[f"bits_per_char_{model}"])
        shown_interval = "[{:.3f}, {:.3f}]".format(*figures["bits_per_char"]["interval"])
        assert shown_interval in table
        assert f"{figures['perplexity']['value']:.3f} [" in page
    assert "federated.in_full.silos" in tiny_run.report["simulation_only"]
    Console(width=200).print(*figure_tables(found["in_full"]))
    assert "perplexity" in capsys.readouterr().out


def test_an_evaluation_of_an_earlier_version_has_its_report(tiny_run, run, capsys):
    evaluation = json.loads(run.evaluation.read_text())
    for entry in (evaluation["base"], *evaluation["federated"], *evaluation["federated-no-dp"]):
        entry.pop("in_full", None)
    run.evaluation.write_text(json.dumps(evaluation))
    found, page, _ = shown(tiny_run.config(), run, capsys)
    assert found["in_full"] == {"silos": {}, "public": {}}
    assert found["bits_per_char_dp"] == tiny_run.report["federated"]["bits_per_char_dp"]
    assert "Figures of" not in page


def test_a_figure_that_is_missing_has_its_reason_on_the_page(tiny_run, run, capsys):
    evaluation = json.loads(run.evaluation.read_text())
    evaluation["base"]["in_full"]["missing"] = ["sacrebleu is not installed"]
    run.evaluation.write_text(json.dumps(evaluation))
    assert missing(evaluation) == ["sacrebleu is not installed"]
    _, page, _ = shown(tiny_run.config(), run, capsys)
    assert "Not there: sacrebleu is not installed" in page


def test_a_run_that_never_validated_has_its_page(tiny_run, run, capsys):
    kept = [line for line in run.events.read_text().splitlines() if json.loads(line)["event"] != "validation"]
    run.events.write_text("\n".join(kept) + "\n")
    _, page, _ = shown(tiny_run.config(), run, capsys)
    assert "validation not available bits per character" in page


def test_the_report_has_what_was_done_to_the_public_text(tiny_run, run):
    report = build(tiny_run.config(), run.directory)
    lines = {line["what"]: line for line in report["text"]}
    manifest = json.loads((tiny_run.directory / "corpus" / "manifest.json").read_text())["metadata"]
    assert lines["dropped: near copies"]["count"] == manifest["cleaning"]["near_duplicates"]
    assert all(line["of"] == manifest["reading"]["rows"] > 0 for line in report["text"])
    assert "<h2>Public text</h2>" in render(report)
    # A run over silos elsewhere may have its base model from another machine.
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    run.events.write_text("".join(json.dumps(event) + "\n" for event in events if event["event"] != "corpus"))
    elsewhere = build(tiny_run.config(), run.directory)
    assert elsewhere["text"] == []
    assert "<h2>Public text</h2>" not in render(elsewhere)


def test_what_was_explained_of_this_model_is_in_its_report(tiny_run, run, capsys):
    pieces = [
        {"text": "<b>my", "gradients": -0.5, "attention": 0.25},
        {"text": " lord", "gradients": 1, "attention": 0.75},
    ]
    told = {"text": "<b>my lord", "answer": "an answer", "nats": 1.5, "without": 1, "unexplained": 0, "pieces": pieces}
    digest = require_manifest(run.federated, FEDERATED, "federate").content_digest
    run.explanations.write_text(json.dumps({"model": digest, "explanations": [told]}))
    assert build(tiny_run.config(), run.directory)["explanations"] == [told]
    page = shown(tiny_run.config(), run, capsys)[1]
    assert '<span title="-0.500 nats" style="background: rgb(232 131 42 / 0.400)">&lt;b&gt;my</span>' in page
    run.explanations.write_text(json.dumps({"model": "of another model", "explanations": [told]}))
    assert build(tiny_run.config(), run.directory)["explanations"] == []
    assert "Answers explained" not in shown(tiny_run.config(), run, capsys)[1]
    run.explanations.write_text("[]")
    with pytest.raises(InputError, match=r"explanations\.json"):
        build(tiny_run.config(), run.directory)
