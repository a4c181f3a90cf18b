"""The names on disk have one home: they are what they always were, and no other product file writes one out."""

import ast
from pathlib import Path

import pytest
from repository import REPOSITORY

from cluster.pipeline import set_aside_finished
from configs.errors import InputError
from configs.load import load
from configs.locks import working_on
from configs.run_directory import bind_run_directory, run_directory
from configs.schema.data import LARGEST_DATASET_NAME
from configs.schema.schema import LARGEST_RUN_NAME
from configs.storage import layout
from configs.storage.files import write_atomic
from configs.storage.layout import RunFiles, SiloFiles, name_on_disk
from federated.simulation.simulated_places import simulated_ledger
from privacy.ledger.journal import default_anchor_dir
from trainer.data.packing import train_tokens

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
        "explanations": "explanations.json",
        "explained_page": "explanations.html",
        "showcase": "showcase.json",
        "showcase_page": "showcase.html",
        "synthetic": "synthetic",
        "dossier": "dossier",
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
        "source": "source.json",
        "traffic": "audit.jsonl",
        "strangers": "strangers.jsonl",
        "personal": "personal",
        "released": "released",
        "remainders": "remainders",
        "attack_report": "attack/attack.json",
        "attack_page": "attack/attack.html",
        "enrolment": "enrolment.json",
        "trusted": "trusted",
        "mandates": "mandates",
        "revoked_mandates": "mandates/revoked",
        "roster": "roster",
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


@pytest.mark.parametrize("length", range(240, 256))
def test_a_name_as_long_as_the_file_system_takes_can_be_written(tmp_path, length):
    """Before: a silo of 27 Chinese characters could not be enrolled, since a file is first written by a longer name."""
    path = tmp_path / ("n" * length)
    write_atomic(path, b"content")
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("characters", range(20, 101))
def test_every_name_of_a_silo_has_a_file_and_a_folder_with_an_anchor(tmp_path, characters):
    name = name_on_disk("\u697c" * characters, safe=" ")
    write_atomic(tmp_path / f"{name}.json", b"")
    default_anchor_dir(tmp_path / name).mkdir()


def test_the_longest_names_of_runs_datasets_and_corpora_have_their_folders(tmp_path):
    run, dataset, corpus = "r" * LARGEST_RUN_NAME, "d" * LARGEST_DATASET_NAME, "c" * 100
    values = [f"run.storage={tmp_path}", f'data.corpora.{corpus}.source="x.jsonl"']
    config = load(
        "tiny",
        [*values, f"run.name={run}", f"data.private.dataset_id={dataset}", f"federated.state_dir={tmp_path}/state"],
    )
    with working_on(run_directory(config)):
        bind_run_directory(config)
    write_atomic(RunFiles(run_directory(config)).report, b"{}")
    set_aside_finished(config, lambda _: None)
    (tmp_path / train_tokens(corpus)).with_suffix(".positions").touch()
    default_anchor_dir(simulated_ledger(config)).mkdir(parents=True)
    for longer in (f"run.name={run}r", f"data.private.dataset_id={dataset}d", f'data.corpora.{corpus}c.source="x"'):
        with pytest.raises(InputError, match="at most"):
            load("tiny", [longer])
