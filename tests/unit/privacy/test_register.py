"""One place for the ledgers of a dataset, of all that a user runs on a machine."""

import json
import multiprocessing
import shutil
import stat
from pathlib import Path

import pytest

from configs.errors import InputError, SiloweaveError
from configs.storage.layout import SiloFiles
from privacy.ledger.chain import Budget
from privacy.ledger.ledger import Ledger
from privacy.register import only_ledger, register_file


def opened(folder, dataset="ward"):
    """As a silo does it: its ledger is opened inside."""
    with only_ledger(dataset, folder, SiloFiles(folder).key):
        Ledger.open(folder, "north", dataset, Budget(20.0, 1e-4)).close_file()


def refused(folder, dataset="ward"):
    before = register_file().read_bytes()
    with pytest.raises(InputError) as caught:
        opened(folder, dataset)
    assert "\n" not in str(caught.value)
    assert register_file().read_bytes() == before
    return str(caught.value)


def test_a_second_ledger_of_a_dataset_is_refused_before_it_is_made(tmp_path):
    opened(tmp_path / "first")
    opened(tmp_path / "first")
    said = refused(tmp_path / "second")
    assert f"the ledgers of dataset 'ward' are in {tmp_path / 'first'} (as {register_file()} says)" in said
    assert "another dataset_id" in said
    assert not (tmp_path / "second").exists()
    opened(tmp_path / "second", "other-ward")
    assert set(json.loads(register_file().read_text())) == {"ward", "other-ward"}


def test_the_register_is_the_users_alone(tmp_path):
    opened(tmp_path / "first")
    assert stat.S_IMODE(register_file().stat().st_mode) == 0o600
    assert stat.S_IMODE(register_file().parent.stat().st_mode) == 0o700
    assert [path.name for path in register_file().parent.iterdir()] == ["datasets.json"]


def test_another_way_to_the_same_folder_is_the_same(tmp_path, monkeypatch):
    opened(tmp_path / "first")
    (tmp_path / "link").symlink_to(tmp_path / "first", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path / "link", Path("first"), tmp_path / "first" / ".." / "first"):
        with only_ledger("ward", place, SiloFiles(place).key):
            pass
    assert json.loads(register_file().read_text())["ward"]["folder"] == str(tmp_path / "first")


def test_a_copy_is_a_second_ledger_and_a_moved_folder_is_not(tmp_path):
    opened(tmp_path / "first")
    for name in ("first", "first.anchor"):
        shutil.copytree(tmp_path / name, tmp_path / name.replace("first", "copy"))
    refused(tmp_path / "copy")
    for name in ("first", "first.anchor"):
        (tmp_path / name).rename(tmp_path / name.replace("first", "moved"))
    refused(tmp_path / "new")
    opened(tmp_path / "moved")
    refused(tmp_path / "copy")
    assert refused(tmp_path / "first").startswith(f"{tmp_path / 'first'}: the ledgers of dataset 'ward' are in")
    assert not (tmp_path / "first").exists()


def test_a_deleted_ledger_is_no_new_budget(tmp_path):
    opened(tmp_path / "first")
    for name in ("first", "first.anchor"):
        shutil.rmtree(tmp_path / name)
    said = refused(tmp_path / "first")
    assert said.startswith(f"{tmp_path / 'first'}: the ledgers of dataset 'ward', or silo.key, by which they are")
    assert not (tmp_path / "first").exists()
    refused(tmp_path / "second")


def test_a_key_alone_is_no_ledger(tmp_path):
    opened(tmp_path / "first")
    key = SiloFiles(tmp_path / "first").key.read_bytes()
    for name in ("first", "first.anchor"):
        shutil.rmtree(tmp_path / name)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        SiloFiles(tmp_path / name).key.touch(mode=0o600)
        SiloFiles(tmp_path / name).key.write_bytes(key)
        refused(tmp_path / name)
        assert [path.name for path in (tmp_path / name).iterdir()] == ["silo.key"]


def test_what_ended_before_it_had_a_ledger_may_start_again(tmp_path):
    folder = tmp_path / "first"
    for _ in range(2):
        with only_ledger("ward", folder, SiloFiles(folder).key):
            pass
    opened(folder)
    refused(tmp_path / "second")


def test_a_ledger_from_before_the_register_is_taken_in_with_its_key(tmp_path):
    Ledger.open(tmp_path / "first", "north", "ward", Budget(20.0, 1e-4)).close_file()
    key = SiloFiles(tmp_path / "first").key
    key.rename(tmp_path / "key")
    with pytest.raises(InputError, match="by which they are known, are missing"):
        opened(tmp_path / "first")
    assert not key.exists() and not register_file().exists()
    (tmp_path / "key").rename(key)
    opened(tmp_path / "first")
    refused(tmp_path / "second")


def test_what_could_not_be_opened_is_not_written_down(tmp_path):
    opened(tmp_path / "first")
    with pytest.raises(InputError, match="give each dataset a state_dir of its own"):
        opened(tmp_path / "first", "other")
    assert set(json.loads(register_file().read_text())) == {"ward"}
    opened(tmp_path / "second", "other")


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"ward": 7}', b'{"ward": {"folder": "/x"}}', b"[" * 10000])
def test_a_damaged_register_is_no_empty_one(content, tmp_path):
    opened(tmp_path / "first")
    register_file().write_bytes(content)
    said = refused(tmp_path / "second")
    assert said.startswith(str(register_file()))


def test_where_no_register_can_be_written_nothing_is_opened(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(SiloweaveError, match=r"can't be made .* set XDG_STATE_HOME, or HOME"):
        opened(tmp_path / "first")
    assert not (tmp_path / "first").exists()


def _race(folder, start, results):
    start.wait()
    try:
        opened(folder)
        results.put((folder.name, ""))
    except InputError as error:
        results.put((folder.name, str(error)))


def test_of_two_that_start_at_once_one_has_the_dataset(tmp_path):
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(4), context.Queue()
    started = [context.Process(target=_race, args=(tmp_path / f"s{n}", start, results)) for n in range(4)]
    for process in started:
        process.start()
    found = [results.get(timeout=300) for _ in started]
    for process in started:
        process.join()
    assert len([name for name, said in found if not said]) == 1
    assert all("a second budget" in said for _, said in found if said)
    assert len(list(tmp_path.glob("*/ledger.sqlite"))) == 1
