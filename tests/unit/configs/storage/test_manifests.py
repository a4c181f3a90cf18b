import json
import subprocess
import sys

import pytest
from users import another_user, folder_for_everybody

from configs.errors import InputError
from configs.events import EventLog, read_events
from configs.schema.data import SourceSettings
from configs.storage.files import canonical_json, write_atomic
from configs.storage.manifests import Manifest, commit_manifest, damaged_file, read_manifest, require_manifest
from trainer.data.sources import ReadCounts, read_rows


def test_equal_values_have_equal_bytes():
    assert canonical_json({"b": 1, "a": [1.5, None]}) == canonical_json({"a": [1.5, None], "b": 1})


def test_a_manifest_proves_its_directory(tmp_path):
    (tmp_path / "data.bin").write_bytes(b"tokens")
    commit_manifest(tmp_path, Manifest("corpus", "digest"))
    manifest = require_manifest(tmp_path, "corpus", "prepare")
    assert manifest.files["data.bin"]["size_bytes"] == 6
    assert damaged_file(tmp_path, manifest) is None
    (tmp_path / "data.bin").write_bytes(b"tokenz")
    assert damaged_file(tmp_path, manifest) == "data.bin"
    with pytest.raises(InputError, match=r"data.bin: its digest is not the manifest's"):
        require_manifest(tmp_path, "corpus", "prepare")


def test_a_newer_manifest_and_another_kind_are_refused(tmp_path):
    commit_manifest(tmp_path, Manifest("corpus", "digest"))
    with pytest.raises(InputError, match="expected 'model'"):
        read_manifest(tmp_path, "model")
    value = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**value, "version": 99}))
    with pytest.raises(InputError, match="version 99 is newer"):
        read_manifest(tmp_path, "corpus")


def test_a_full_disk_leaves_the_old_content(tmp_path):
    """The real thing: the system refuses to let the file grow (RLIMIT_FSIZE)."""
    path = tmp_path / "commit.json"
    write_atomic(path, b"old")
    script = (
        "import resource, signal, sys; from pathlib import Path; from configs.storage.files import write_atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_atomic(Path(sys.argv[1]), b'n' * 5000)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "could not be written" in done.stderr
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["commit.json"]


def test_a_last_event_cut_short_is_passed_over(tmp_path):
    seen = []
    log = EventLog(tmp_path / "events.jsonl", (seen.append,))
    log.emit("pretrain", "step", step=1)
    with log.path.open("a") as file:
        file.write('{"stage": "pretrain", "eve')
    assert [event["step"] for event in read_events(log.path, "pretrain")] == [1]
    assert seen[0]["step"] == 1


def test_one_progress_bar_a_stage():
    from cluster.monitoring.console import Progressing

    progress = Progressing()
    progress._bars = True
    for step in range(1, 21):
        progress(
            {"stage": "pretrain", "event": "step", "step": step, "steps": 20, "loss": 1.0, "tokens": 1, "seconds": 1}
        )
    assert len(progress._progress.tasks) == 1
    assert progress._progress.tasks[0].completed == 20


@pytest.fixture
def closed_folder():
    """A folder with a model and records, and whom it is closed to: another user for root, and everybody else."""
    with folder_for_everybody() as folder:
        (folder / "model").mkdir(mode=0o755)
        (folder / "model" / "weights").write_bytes(b"weights")
        commit_manifest(folder / "model", Manifest("model", "digest"))
        (folder / "records.jsonl").write_text('{"text": "a record"}\n')
        yield folder


@pytest.mark.parametrize("closed", ["model/manifest.json", "model/weights", "model", "records.jsonl", "."])
def test_what_this_user_may_not_read_is_one_line_with_the_file_and_the_fix(closed_folder, closed):
    (closed_folder / closed).chmod(0)
    reads = {
        "model": lambda: require_manifest(closed_folder / "model", "model", "export"),
        "records": lambda: list(
            read_rows(SourceSettings(source=str(closed_folder / "records.jsonl")), (), ReadCounts())
        ),
    }
    with another_user() as user:
        for name, read in reads.items():
            if closed.startswith((name, ".")):
                with pytest.raises(InputError, match=rf"user {user} may not read it; give that user") as caught:
                    read()
                assert str(caught.value).startswith(str((closed_folder / closed).resolve()))
            else:
                read()
