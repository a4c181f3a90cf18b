"""The names on disk have one home: they are what they always were, and no other product file writes one out."""

import ast
from pathlib import Path

import pytest
from repository import REPOSITORY

from configs.storage import layout
from configs.storage.layout import RunFiles, SiloFiles

PRODUCT = ("configs", "trainer", "privacy", "federated", "cluster")
ON_DISK = {
    RunFiles: {
        "config": "config.toml",
        "events": "events.jsonl",
        "corpus_parts": "corpus-parts",
        "corpus": "corpus",
        "tokenizer": "tokenizer",
        "checkpoints": "pretrain/checkpoints",
        "model": "model",
        "federated": "federated",
        "no_dp": "federated-no-dp",
        "certificate": "federated/certificate.json",
        "evaluation": "evaluation.json",
        "sample": "sample.txt",
        "report": "report.json",
        "page": "report.html",
        "audit": "audit",
        "audit_report": "audit/audit.json",
        "tune": "tune",
        "tune_report": "tune/tune.json",
        "tensorboard": "tensorboard",
        "mlflow": "mlflow.json",
    },
    SiloFiles: {
        "key": "silo.key",
        "split_key": "split.key",
        "ledger": "ledger.sqlite",
        "log": "silo.log",
        "traffic": "audit.jsonl",
        "strangers": "strangers.jsonl",
        "personal": "personal",
        "enrolment": "enrolment.json",
        "trusted": "trusted",
        "tls": "tls",
        "service_key": "tls/service.key",
        "service_certificate": "tls/service.crt",
    },
}
ELSEWHERE = {
    ("federated/deployment/superlink.py", "config.toml"),  # Flower's own settings, in Flower's own folder
    ("cluster/runtime/jobs.py", "federated"),  # the package
}


@pytest.mark.parametrize("files", ON_DISK)
def test_nothing_on_disk_has_another_name(files):
    """A run or a silo that an earlier version has made is found as it lies there."""
    named = {name for name, value in vars(files).items() if isinstance(value, property)} - {"lock"}
    found = {name: getattr(files(Path("/here")), name) for name in named}
    assert found == {name: Path("/here", path) for name, path in ON_DISK[files].items()}


def test_a_runs_lock_lies_beside_it():
    assert RunFiles(Path("/runs/demo")).lock == Path("/runs/.demo.lock")


def written_out(tree, names):
    """Names that a file writes out: one that is no common word wherever it stands, a word where a path is joined."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in names and not node.value.isidentifier():
            yield node.value
        joined = node.right if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) else None
        parts = (
            node.args if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("Path", "joinpath")) else []
        )
        for part in (joined, *parts):
            if isinstance(part, ast.Constant) and part.value in names:
                yield part.value


NAMES = {part for paths in ON_DISK.values() for path in paths.values() for part in Path(path).parts}


@pytest.mark.parametrize("code", ['x / "model"', 'x / "a" / "tls"', 'Path(x, "federated")', 'say("silo.key")'])
def test_a_name_that_is_written_out_is_found(code):
    assert list(written_out(ast.parse(code), NAMES))


@pytest.mark.parametrize("package", PRODUCT)
def test_no_other_file_writes_a_name_out(package):
    for path in (REPOSITORY / package).rglob("*.py"):
        place = str(path.relative_to(REPOSITORY))
        if path != Path(layout.__file__):
            found = {(place, name) for name in written_out(ast.parse(path.read_text()), NAMES)}
            assert not found - ELSEWHERE
