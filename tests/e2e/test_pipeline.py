"""The documents' commands as a user gives them, with `tiny` for `demo`."""

import io
import json
import re
import shlex
import shutil

import pytest
import torch
from repository import REPOSITORY
from small_corpus import write_corpus

from privacy.ledger.statements import Receipt
from trainer.pretraining.onednn import mkl_holds_back


def test_the_report_has_every_promised_figure(tiny_run):
    report = tiny_run.report
    assert report == json.loads((tiny_run.directory / "report.json").read_text())
    pretrain, federated, privacy = report["pretrain"], report["federated"], report["privacy"]
    assert (pretrain["world_size"], pretrain["zero_stage"], pretrain["steps"]) == (2, 2, 40)
    assert pretrain["tokens"] == 40 * 8 * 64
    assert pretrain["loss_last"] < pretrain["loss_first"]
    assert pretrain["tokens_per_s"] > 0
    assert 1 < pretrain["validation_bits_per_char"] < 8
    assert (federated["silos"], federated["rounds"]) == (6, 2)
    assert 0 < federated["bytes_per_round"] / (2 * 6) < federated["full_model_bytes"]
    assert federated["bits_per_char_dp"] < federated["bits_per_char_base"]
    assert federated["bits_per_char_no_dp"] < federated["bits_per_char_base"]
    assert len(federated["by_silo"]) == 6
    assert len(federated["by_round"]["dp"]) == 2
    assert (privacy["unit"], privacy["delta"]) == ("record", 1e-5)
    assert 7.5 < privacy["epsilon"] <= 8
    assert privacy["epsilon_sum"] == pytest.approx(6 * privacy["epsilon"])
    assert privacy["headline"]["epsilon"] == privacy["epsilon"]  # a speech is in one silo: every steward attests it
    assert privacy["headline"]["rule"].startswith("maximum")
    assert privacy["epsilon_rdp"] > privacy["epsilon"]
    assert privacy["epsilon_prv"] is None or privacy["epsilon_prv"] == pytest.approx(privacy["epsilon"], rel=0.02)
    for silo in privacy["silos"].values():
        assert silo["charges"] == 2
        assert silo["epsilon"] == privacy["epsilon"]
        assert silo["budget_epsilon"] == 32
        assert silo["public_record_count"] % 100 == 0
    assert report["sample"].startswith("What is")
    assert "federated.bits_per_char_*" in report["simulation_only"]
    assert set(report["versions"]) >= {"torch", "ray", "deepspeed", "flwr", "opacus"}
    assert set(report["seconds"]) >= {"prepare", "pretrain", "export", "federated", "federated-no-dp", "evaluate"}


def test_the_page_is_self_contained(tiny_run):
    page = (tiny_run.directory / "report.html").read_text()
    assert page.count("<svg") == 3
    assert re.findall(r'(?:src|href)="(?!#)([^"]*)', page) == ["showcase.html"]  # the page beside it
    shown = (tiny_run.directory / "showcase.html").read_text()
    assert re.findall(r'(?:src|href)="(?!#)([^"]*)', shown) == ["report.html"]
    assert "Certificate" in page
    assert page.count("<td>signed</td>") == 6
    assert "simulation_only" in page


def test_page_and_table_show_f1_with_its_error(tiny_run):
    from rich.console import Console

    from cluster.monitoring.console import result_table
    from cluster.report.page import render

    known = {"bits_per_char": 2.5, "bits_per_char_error": 0.25, "accuracy": None, "accuracy_error": None}
    f1 = {"macro_f1": 0.625, "macro_f1_error": 0.0625, "f1_by_label": {"yes <b>": {"f1": 0.75, "f1_error": 0.125}}}
    federated = {**tiny_run.report["federated"], "private_evaluation": [{"round": 2, "silos": ["a"], **known, **f1}]}
    silos = {name: {**silo, "charges": 3} for name, silo in tiny_run.report["privacy"]["silos"].items()}  # two rounds
    report = {**tiny_run.report, "federated": federated, "privacy": {**tiny_run.report["privacy"], "silos": silos}}
    page = render(report)
    for text in ("2.500 &plusmn; 0.250", "lost in the noise", "0.625 &plusmn; 0.062", "F1 of yes &lt;b&gt;", "0.750"):
        assert text in page
    text = io.StringIO()
    Console(file=text, width=200).print(result_table(report))
    assert "2.500 ± 0.250; macro F1 0.625 ± 0.062" in text.getvalue()
    federated["private_evaluation"] = [{"round": 2, "silos": ["a"], **known}]
    assert "F1" not in render(report)


def test_progress_is_shown_as_plain_lines_without_a_terminal(tiny_run, siloweave, tmp_path, monkeypatch):
    shutil.copytree(tiny_run.root, tmp_path / "copy")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "copy" / "state"))
    done = siloweave("evaluate", "-c", "tiny", cwd=tmp_path / "copy")
    assert done.returncode == 0, done.stderr
    assert "evaluate: 5/5" in done.stderr
    assert "\x1b" not in done.stderr
    explained = siloweave("explain", "-c", "tiny", "<script>Good morrow", "--json", cwd=tmp_path / "copy")
    assert explained.returncode == 0, explained.stderr
    (one,) = json.loads(explained.stdout)["explanations"]
    assert "".join(piece["text"] for piece in one["pieces"]).endswith("<script>Good morrow")
    assert json.loads((tmp_path / "copy/runs/tiny/explanations.json").read_text())["explanations"] == [one]
    page = (tmp_path / "copy/runs/tiny/explanations.html").read_text()
    assert "<script>" not in page
    assert "Abnar and Zuidema" in page


def test_no_exact_figure_of_a_silo_is_in_the_run_directory(tiny_run):
    """Events, receipts and certificate hold no loss, norm or count of private data."""
    federation = tiny_run.directory / "federated"
    allowed = {"time", "stage", "event", "round", "rounds", "answered", "bytes", "seconds", "epsilon_left"}
    for line in (federation / "events.jsonl").read_text().splitlines():
        assert set(json.loads(line)) <= allowed
    for path in federation.glob("round-*/silos.json"):
        for silo in json.loads(path.read_text()).values():
            assert set(silo) == {"dataset_id", "public_key", "public_record_count", "receipt"}
            assert set(silo["receipt"]) == set(Receipt.model_fields) - {"mandate"}  # which this run had none of
    assert not list(tiny_run.directory.rglob("*.sqlite*"))
    assert len(list((tiny_run.root / "state").rglob("ledger.sqlite"))) == 6


def test_the_runs_events_say_what_computes_its_linear_layers(tiny_run):
    events = [json.loads(line) for line in (tiny_run.directory / "events.jsonl").read_text().splitlines()]
    starts = [event["onednn"] for event in events if event["event"] == "started"]
    assert starts
    assert set(starts) == {mkl_holds_back()}


def test_the_adapter_is_a_peft_directory(tiny_run):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_run.model)
    ids = torch.tensor([[0, 5, 6, 7]])
    before = base(input_ids=ids).logits.detach()
    tuned = PeftModel.from_pretrained(base, tiny_run.directory / "federated" / "adapter")
    assert not torch.allclose(tuned(input_ids=ids).logits, before)


def test_the_certificate_says_of_which_model_it_speaks(tiny_run, siloweave, tmp_path):
    """Of both folders of the run, of nothing else, and as the report and the model card name it."""
    federation = tiny_run.directory / "federated"
    certificate = json.loads((federation / "certificate.json").read_text())
    given = ("ledger", "verify", "--certificate", str(federation / "certificate.json"), "--model")
    for folder, part in ((federation / "adapter", "final adapter"), (tiny_run.model, "base model")):
        done = siloweave(*given, str(folder), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"{folder}: is the certificate's {part}" in done.stdout
    other = siloweave(*given, str(tiny_run.directory / "federated-no-dp" / "adapter"), cwd=tmp_path)
    assert other.returncode == 2
    assert "this is another model" in other.stderr and other.stderr.count("\n") == 1
    state = next((tiny_run.root / "state").rglob("roman/ledger.sqlite")).parent
    both = siloweave(
        "ledger", "verify", str(state), *given[2:4], "--model", str(tiny_run.model), "--json", cwd=tmp_path
    )
    assert json.loads(both.stdout)["model"] == "base model", both.stderr  # and its releases are in the ledger
    model = certificate["model"]
    assert [set(one["releases"]) for one in model["rounds"]] == [set(certificate["silos"])] * len(model["rounds"])
    page = (tiny_run.directory / "report.html").read_text()
    card = (federation / "adapter" / "README.md").read_text()
    for digest in (model["base_model"], *model["adapter"].values()):
        assert digest in page and digest in card
    assert tiny_run.report["model"] == {
        "base_model": model["base_model"],
        "adapter": model["adapter"],
        "declared_public_by": None,
    }
    assert "WITHOUT differential privacy" in (tiny_run.directory / "federated-no-dp/adapter/README.md").read_text()


def test_the_documents_commands_run(tiny_run, siloweave, tmp_path, monkeypatch):
    """Every `siloweave ...` line of the documents' shell blocks, in their order, on a copy of the tiny run."""
    root = tmp_path / "documents"
    shutil.copytree(tiny_run.root, root)
    monkeypatch.setenv("XDG_STATE_HOME", str(root / "state"))
    documents = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    blocks = re.findall(r"```sh\n(.*?)```", "\n".join(path.read_text() for path in documents), flags=re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("siloweave ")]
    assert len(commands) >= 19
    for arguments in commands:
        given = [one.replace("demo", "tiny").replace("~/.local/state", str(root / "state")) for one in arguments]
        if given[0] == "tiny":
            continue  # the demo is the fixture's own command
        if given[0] == "audit":
            given += ["--canaries", "200"]  # as many as it takes are in test_audit.py
        done = siloweave(*given, cwd=root)
        assert done.returncode == 0, f"{given}: {done.stderr}"


def test_a_second_demo_starts_anew_and_reserves_again(tiny_run, siloweave, tmp_path, monkeypatch):
    root = tmp_path / "again"
    shutil.copytree(tiny_run.root, root)
    monkeypatch.setenv("XDG_STATE_HOME", str(root / "state"))
    write_corpus(root / "corpus.jsonl")
    settings = (
        *("data.public.source=corpus.jsonl", "cluster.world_size=1", "pretrain.steps=10", "evaluate.without_dp=false"),
        *("federated.rounds=1", "federated.workers=1", "privacy.epsilon=1"),
    )
    arguments = [part for setting in settings for part in ("--set", setting)]
    done = siloweave("demo", "-c", "tiny", "--json", *arguments, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "had finished before: kept as" in done.stderr
    kept = [path for path in (root / "runs").iterdir() if path.name.startswith("tiny-until-")]
    assert (kept[0] / "report.json").exists()
    shown = siloweave("ledger", "show", "--json", "state/siloweave/ledgers/plays-tiny/roman", cwd=root)
    kinds = [entry["kind"] for entry in json.loads(shown.stdout)["entries"]]
    assert kinds.count("reserve") == 2
    again = json.loads(done.stdout)["privacy"]["silos"]["roman"]
    assert again["charges"] == 1
    # A third one is too much for a budget of 9.5: refused by policy, with a single line. It has its model already.
    for name in ("corpus", "tokenizer", "pretrain", "model"):
        shutil.copytree(root / "runs" / "tiny" / name, root / "runs" / "third" / name)
    spent = siloweave(
        "demo",
        "-c",
        "tiny",
        "--json",
        *arguments,
        "--set",
        "privacy.budget_epsilon=9.5",
        "--set",
        "run.name=third",
        cwd=root,
    )
    assert spent.returncode == 3
    assert json.loads(spent.stdout)["exit_status"] == 3
    errors = [line for line in spent.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "budget_epsilon" in errors[0]
