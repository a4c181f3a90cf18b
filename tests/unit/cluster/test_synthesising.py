"""From a finished run to a folder of records: what lies there, what is refused, and that no private record is read."""

import csv
import json
import shutil
import sys

import pyarrow.parquet as pq
import pytest
import torch
from repository import REPOSITORY
from served_models import a_labelling_run, a_model
from taught_models import a_taught_federation, a_taught_model

from cluster.synthesising import Wanted, _copied, make, usual_file
from configs.errors import InputError
from configs.storage.files import digest_file
from configs.storage.layout import CERTIFICATE
from configs.storage.manifests import Manifest, commit_manifest, require_manifest
from trainer.synthesis.drawing import Fruitless

OPENED = []
AT_RENAME = {}


def hook(event, arguments):
    if event == "open":
        OPENED.append(str(arguments[0]))
    elif event == "os.rename" and (act := AT_RENAME.pop(str(arguments[1]), None)):
        act()


sys.addaudithook(hook)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return a_taught_model(tmp_path_factory.mktemp("base") / "model")


def a_run(folder, base, private="private.jsonl"):
    a_taught_federation(folder, base)
    text = (REPOSITORY / "configs" / "tiny.toml").read_text()
    text = text.replace('"embedded:plays"', f'"{private}"').replace("without_dp = true", "without_dp = false")
    (folder / "config.toml").write_text(text.replace("public = true\n", 'public = false\ntext = "note"\n'))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, base):
    return a_run(tmp_path_factory.mktemp("runs") / "run", base)


def wanted(file, number=12, **changes):
    return Wanted(number, file, **{"not_private": True, **changes})


def test_a_folder_says_which_model_wrote_it_and_what_bounds_it(run, tmp_path):
    made = make(run, wanted(tmp_path / "out" / "notes.jsonl", given=["text=old | `red` "]))
    records = [json.loads(line) for line in (tmp_path / "out" / "notes.jsonl").read_text().splitlines()]
    assert len(records) == made["records"] == 12
    assert all(list(record) == ["note"] and record["note"].startswith("old | `red` ") for record in records)
    federation = require_manifest(run / "federated", "federated", "federate")
    manifest = require_manifest(tmp_path / "out", "synthetic", "synthesise")
    assert manifest.inputs == {"model": federation.content_digest}
    assert manifest.content_digest == made["digest"]
    assert sorted(manifest.files) == ["README.md", "notes.jsonl"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "NOT PRIVATE: no certificate lies with this model" in card
    assert federation.content_digest in card
    assert "text=old \\| 'red' " in card
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_tables_hold_the_same_records(run, tmp_path):
    for kind in ("jsonl", "csv", "parquet"):
        make(run, wanted(tmp_path / kind / f"notes.{kind}"))
    lines = (tmp_path / "jsonl" / "notes.jsonl").read_text().splitlines()
    with (tmp_path / "csv" / "notes.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [json.loads(line) for line in lines]
    assert pq.read_table(tmp_path / "parquet" / "notes.parquet").to_pylist() == [json.loads(line) for line in lines]


def test_no_private_record_is_read_or_changes_anything(base, tmp_path):
    """Filtering and finding copies go by the model's texts alone: with other private records all is the same."""
    runs = [a_run(tmp_path / name / "run", base, f"{name}/private.jsonl") for name in ("one", "two", "none")]
    first = make(runs[0], wanted(tmp_path / "out" / "notes.jsonl"))
    own = (tmp_path / "out" / "notes.jsonl").read_text()
    (tmp_path / "one" / "private.jsonl").write_text('{"note": "nothing like it"}\n')
    (tmp_path / "two" / "private.jsonl").write_text(own)  # the model's very words: copies would be found
    OPENED.clear()
    again = [make(place, wanted(tmp_path / f"out-{place.parent.name}" / "notes.jsonl")) for place in runs]
    for place, made in zip(runs, again, strict=True):
        assert (tmp_path / f"out-{place.parent.name}" / "notes.jsonl").read_text() == own
        assert made["dropped"] == first["dropped"]
    assert any("model.safetensors" in name for name in OPENED), "the hook has seen nothing"
    assert not [name for name in OPENED if "private.jsonl" in name]


def test_a_model_without_a_guarantee_is_refused_by_name(run, base, tmp_path):
    with pytest.raises(InputError, match=r"run: no certificate lies with this model.*or --not-private"):
        make(run, wanted(tmp_path / "out" / "a.jsonl", not_private=False))
    other = run / "federated-no-dp"
    shutil.copytree(run / "federated" / "adapter", other / "adapter")
    made = require_manifest(run / "federated", "federated", "federate")
    commit_manifest(other, Manifest("federated-no-dp", "made-up", inputs=made.inputs))
    with pytest.raises(InputError, match="federated-no-dp: was trained WITHOUT differential privacy"):
        make(other, wanted(tmp_path / "out" / "a.jsonl", not_private=False))
    (run / "federated" / CERTIFICATE).write_text('{"version": 7}')
    try:
        with pytest.raises(InputError, match=CERTIFICATE):  # also where no guarantee is asked for
            make(run, wanted(tmp_path / "out" / "a.jsonl"))
    finally:
        (run / "federated" / CERTIFICATE).unlink()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"number": 0}, "--records 0: give a number from 1"),
        ({"number": 10**9}, "--records 1000000000: give a number from 1"),
        ({"file": "out/a.txt"}, "of what kind it is, its suffix says"),
        ({"file": "a.jsonl"}, "exists; give a file in a folder that is not there yet"),
        ({"decode": ["temperature=0"]}, "temperature=0: every text would be the same"),
        ({"decode": ["beams=2"]}, "temperature=0: every text would be the same"),
        ({"decode": ["tmperature=1"]}, "give NAME=VALUE, with one of the names"),
        ({"given": ["label=old"]}, "give FIELD=VALUE; the fields are text"),
        ({"given": [f"text={'the old ship ' * 400}"]}, "tokens, and the model's context is"),
    ],
)
def test_what_cannot_be_made_is_one_line_and_leaves_nothing(run, tmp_path, changes, message):
    file = tmp_path / changes.pop("file", "out/a.jsonl")
    with pytest.raises(InputError, match=message) as refused:
        make(run, wanted(file, **changes))
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


class KilledError(BaseException):
    """Nothing after it is run, as if the process had ended there."""


def test_a_command_that_was_killed_at_its_end_is_gone_on_with(run, tmp_path):
    make(run, wanted(tmp_path / "whole" / "a.jsonl"))

    def kill(done, of):
        if done == of:
            raise KilledError

    with pytest.raises(KilledError):
        make(run, wanted(tmp_path / "out" / "a.jsonl"), kill)
    left = tmp_path / ".out.part" / "made"
    left.mkdir()
    (left / "other.jsonl").write_text("{}\n")
    made = make(run, wanted(tmp_path / "out" / "a.jsonl"))
    assert made["resumed"] == made["drawn"]
    for name in ("README.md", "a.jsonl", "manifest.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "a.jsonl", "manifest.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_folder_that_is_none_of_ours_is_refused_and_stays(run, tmp_path):
    other = tmp_path / ".out.part" / "other.jsonl"
    other.parent.mkdir()
    other.write_text("{}\n")
    with pytest.raises(InputError, match=r"\.out\.part: is no interrupted command's; move it away"):
        make(run, wanted(tmp_path / "out" / "a.jsonl"))
    assert other.read_text() == "{}\n"
    assert [path.name for path in tmp_path.iterdir()] == [".out.part"]
    other.unlink()
    other.parent.rmdir()
    other.parent.write_text("a file")
    with pytest.raises(InputError, match=r"\.out\.part: is no interrupted command's; move it away"):
        make(run, wanted(tmp_path / "out" / "a.jsonl"))


def test_a_second_command_is_kept_off_until_the_folder_is_there(run, tmp_path):
    """It is started in the middle of the first one, right before the folder gets its name, and right after."""
    late, said = wanted(tmp_path / "out" / "a.jsonl"), []

    def start_another(*_):
        with pytest.raises(InputError) as refused:
            make(run, late)
        said.append(str(refused.value))

    AT_RENAME[str(tmp_path / "out")] = start_another
    make(run, wanted(tmp_path / "out" / "a.jsonl"), lambda *_: said or start_another())
    assert len(said) == 2
    assert not AT_RENAME
    assert set(said) == {f"{tmp_path / 'out'}: another command is making it; wait for that one"}
    before = (tmp_path / "out" / "a.jsonl").read_bytes()
    with pytest.raises(InputError, match="out: exists; give a file in a folder that is not there yet"):
        make(run, late)
    assert (tmp_path / "out" / "a.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_certificate_that_comes_along_is_the_one_that_was_checked(tmp_path):
    certificate, folder = tmp_path / CERTIFICATE, tmp_path / "out"
    folder.mkdir()
    certificate.write_text("{}")
    checked = digest_file(certificate)
    assert _copied(certificate, folder, checked) == digest_file(folder / CERTIFICATE)
    certificate.write_text("{ }")
    with pytest.raises(InputError, match="was changed since it was checked"):
        _copied(certificate, folder, checked)


def test_a_model_that_writes_nothing_worth_keeping_leaves_nothing(run, tmp_path):
    with pytest.raises(Fruitless, match="any record: of the last 640 texts none could be kept"):
        make(run, wanted(tmp_path / "out" / "a.jsonl", decode=["max_new_tokens=2"]))
    assert not list(tmp_path.iterdir())


def test_a_model_outside_of_a_run_or_of_labels_is_refused(base, tmp_path):
    with pytest.raises(InputError, match="lies in no run, whose settings say what a record is"):
        usual_file(base)
    with pytest.raises(InputError, match="nowhere: no such folder; give a run's directory"):
        usual_file(tmp_path / "nowhere")
    with pytest.raises(InputError, match="lies in no run, whose settings say what a record is"):
        make(base, wanted(tmp_path / "out" / "a.jsonl"))
    labelling, _, _ = a_labelling_run(
        tmp_path / "labels", a_model(tmp_path / "other"), "classification", ("bad", "good")
    )
    with pytest.raises(InputError, match=r"federated\.task is 'classification': its model has learnt answers"):
        make(labelling, wanted(tmp_path / "out" / "a.jsonl"))
    assert usual_file(labelling / "federated") == labelling.resolve() / "synthetic" / "records.jsonl"
