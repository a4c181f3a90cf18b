"""A machine's mirror of a run in an object store: what is pushed when, what is pulled, and which of two counts."""

import shutil

import pytest

from cluster.runtime.jobs import check_movable
from configs.errors import InputError, SiloweaveError
from configs.load import load
from configs.run_directory import run_directory
from configs.storage.manifests import Manifest, commit_manifest, require_manifest
from configs.storage.mirror import Mirror, open_mirror


class Run:
    """A store, as fsspec's own folder, and machines that know it."""

    def __init__(self, root):
        self.root, self.url = root, f"file://{root}/store/run"
        self.store = root / "store" / "run"

    def machine(self, name):
        mirror = Mirror(self.url, self.root / name / "run")
        mirror.bucket._fs.auto_mkdir = True
        return mirror


@pytest.fixture
def run(tmp_path):
    found = Run(tmp_path)
    first = found.machine("first")
    stage(first, "corpus", b"tokens")
    (first.directory / "config.toml").write_bytes(b"[run]")
    (first.directory / "events.jsonl").write_bytes(b"{}\n")
    first.push()
    return found


def stage(mirror, name, content, kind="corpus"):
    folder = mirror.directory / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "data.bin").write_bytes(content)
    commit_manifest(folder, Manifest(kind, "digest"))


def test_what_is_finished_goes_over_the_store_to_another_machine(run):
    first = run.machine("first")
    half = first.directory / "model"
    half.mkdir()
    (half / "model.safetensors").touch()  # no manifest yet
    (first.directory / "pretrain" / "checkpoints").mkdir(parents=True)
    (first.directory / "pretrain" / "checkpoints" / "left").touch()
    stage(first, "federated/round-00001", b"adapter", "round")
    first.push()
    second = run.machine("second")
    second.pull()
    assert require_manifest(second.directory / "corpus", "corpus", "prepare").files.keys() == {"data.bin"}
    assert (second.directory / "federated" / "round-00001" / "data.bin").read_bytes() == b"adapter"
    assert {path.name for path in second.directory.iterdir()} == {"corpus", "federated", "config.toml", "events.jsonl"}


def test_a_stage_that_was_made_again_replaces_the_old_one_and_is_never_half_there(run, monkeypatch):
    first, second = run.machine("first"), run.machine("second")
    second.pull()
    stage(first, "corpus", b"other tokens")
    with monkeypatch.context() as patch:
        patch.setattr(first.bucket, "write", lambda *_: pytest.fail("killed before the manifest"))
        with pytest.raises(BaseException, match="killed"):
            first.push()
    assert not (run.store / "corpus" / "manifest.json").exists()  # so nobody takes the new files for the old ones
    third = run.machine("third")
    third.pull()
    assert not (third.directory / "corpus" / "manifest.json").exists()
    first.push()
    second.pull()
    assert (second.directory / "corpus" / "data.bin").read_bytes() == b"other tokens"


def test_a_run_that_was_deleted_in_the_store_does_not_come_back(run):
    first = run.machine("first")
    shutil.rmtree(run.store)
    first.pull()
    assert not first.directory.exists()


def test_files_that_are_not_what_the_manifest_says_are_refused(run):
    (run.store / "corpus" / "data.bin").write_bytes(b"t0kens")
    with pytest.raises(SiloweaveError, match=r"corpus/data.bin: its digest is not the manifest's; delete file:"):
        run.machine("second").pull()


def test_the_longer_log_counts(run):
    first, second = run.machine("first"), run.machine("second")
    second.pull()
    (second.directory / "events.jsonl").write_bytes(b"{}\n{}\n")
    second.pull()
    second.push()
    first.pull()
    assert (first.directory / "events.jsonl").read_bytes() == b"{}\n{}\n"


def test_a_finished_run_gets_another_name_in_the_store_and_here(run):
    first = run.machine("first")
    first.move("run-until-then")
    assert not first.bucket.all_names()
    assert (run.store.with_name("run-until-then") / "corpus" / "manifest.json").exists()
    assert (first.directory.with_name("run-until-then") / "config.toml").exists()


def test_a_folder_has_no_mirror_and_a_url_one_below_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SILOWEAVE_CACHE", str(tmp_path))
    assert open_mirror(load("tiny")) is None
    urls = [load("tiny", [f"run.storage={url}"]) for url in ("s3://bucket/a", "s3://bucket/a/", "s3://bucket/b")]
    first, same, other = (run_directory(config) for config in urls)
    assert first == same != other
    assert first.parent.parent == tmp_path
    assert urls[1].run.url == "s3://bucket/a/tiny"


def test_a_job_takes_a_url_where_a_folder_must_be_absolute():
    check_movable("prepare", load("tiny", ["run.storage=s3://bucket/runs"], elsewhere=True))
    with pytest.raises(InputError, match=r"run.storage is .runs.: give an absolute path"):
        load("tiny", elsewhere=True)
