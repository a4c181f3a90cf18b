"""Encrypted rounds are bound to their place: another stage's, run's or round's adapter is refused."""

import json
import shutil

import pytest

from configs.errors import InputError
from configs.storage.files import digest_bytes
from configs.storage.sealing import load_key
from federated.coordinator import round_commits as commits


@pytest.fixture
def key(tmp_path):
    path = tmp_path / "key"
    path.write_bytes(bytes(range(7, 39)))
    path.chmod(0o600)
    return load_key(str(path))


def saved(folder, run, number, key):
    commit = commits.Round(number, f"{folder.name} {run} {number}".encode(), {})
    commits.save(folder, "digest", commit, run, key)
    return folder / f"round-{number:05d}"


def test_a_round_comes_back(tmp_path, key):
    saved(tmp_path / "federated", "run", 1, key)
    found = commits.newest(tmp_path / "federated", "digest", pytest.fail, key)
    assert (found.round_number, found.adapter) == (1, b"federated run 1")


@pytest.mark.parametrize("other", [("federated-no-dp", "run", 1), ("federated", "another", 1), ("federated", "run", 2)])
def test_another_rounds_adapter_is_refused(tmp_path, key, other):
    target = saved(tmp_path / "federated", "run", 1, key)
    stage, run, number = other
    source = saved(tmp_path / "elsewhere" / stage, run, number, key)
    manifest = json.loads((target / "COMMITTED").read_text())
    shutil.copy(source / "adapter.safetensors", target)
    manifest["files"] = json.loads((source / "COMMITTED").read_text())["files"]
    (target / "COMMITTED").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="adapter"):
        commits.newest(tmp_path / "federated", "digest", pytest.fail, key)


def test_a_whole_round_of_the_run_without_dp_is_refused(tmp_path, key):
    shutil.rmtree(saved(tmp_path / "federated", "run", 1, key))
    shutil.copytree(saved(tmp_path / "federated-no-dp", "run", 1, key), tmp_path / "federated" / "round-00001")
    with pytest.raises(InputError, match="adapter"):
        commits.newest(tmp_path / "federated", "digest", pytest.fail, key)


@pytest.mark.parametrize("sealed", [False, True])
def test_the_aggregations_state_is_committed_with_the_round(tmp_path, key, sealed):
    commits.save(tmp_path, "digest", commits.Round(1, b"adapter", {}, b"moments"), "run", key if sealed else None)
    found = commits.newest(tmp_path, "digest", pytest.fail, key if sealed else None)
    assert (found.adapter, found.server_state) == (b"adapter", b"moments")
    content = (tmp_path / "round-00001" / commits.SERVER_STATE).read_bytes()
    assert (content == b"moments") != sealed
    (tmp_path / "round-00001" / commits.SERVER_STATE).unlink()
    said = []
    assert commits.newest(tmp_path, "digest", said.append, key if sealed else None) is None
    assert commits.SERVER_STATE in said[0]


def test_an_adapter_can_not_stand_in_for_the_aggregations_state(tmp_path, key):
    commits.save(tmp_path, "digest", commits.Round(1, b"adapter", {}, b"moments"), "run", key)
    target = tmp_path / "round-00001"
    manifest = json.loads((target / "COMMITTED").read_text())
    shutil.copy(target / commits.ADAPTER, target / commits.SERVER_STATE)
    manifest["files"][commits.SERVER_STATE] = manifest["files"][commits.ADAPTER]
    (target / "COMMITTED").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="server-state"):
        commits.newest(tmp_path, "digest", pytest.fail, key)


def without(folder, *names):
    """Makes a round one of an earlier version, which had no such files."""
    manifest = json.loads((folder / "COMMITTED").read_text())
    for name in names:
        (folder / name).unlink()
        del manifest["files"][name]
    (folder / "COMMITTED").write_text(json.dumps(manifest))


def three_rounds(folder, key):
    """Each holds the digests of those before it. Returns the newest."""
    earlier = ()
    for number in (1, 2, 3):
        releases = {"north": f"{number}" * 64}
        commit = commits.Round(number, f"adapter {number}".encode(), {}, releases=releases, earlier=earlier)
        commits.save(folder, "digest", commit, "run", key)
        earlier = (*earlier, commit.digests)
    return commits.newest(folder, "digest", pytest.fail, key)


@pytest.mark.parametrize("sealed", [False, True])
def test_the_newest_round_alone_tells_the_digests_of_all(tmp_path, key, sealed):
    """Before: they were read from every round, and one that was lost cost the certificate."""
    newest = three_rounds(tmp_path, key if sealed else None)
    shutil.rmtree(tmp_path / "round-00001")
    found = commits.digests(tmp_path, newest, key if sealed else None)
    assert [one.releases for one in found] == [{"north": f"{number}" * 64} for number in (1, 2, 3)]
    assert [one.adapter for one in found] == [digest_bytes(f"adapter {number}".encode()) for number in (1, 2, 3)]


def test_digests_of_an_earlier_versions_rounds_are_read_from_each(tmp_path, key):
    newest = three_rounds(tmp_path, key)
    expected = commits.digests(tmp_path, newest, key)
    for number in (1, 2, 3):
        without(tmp_path / f"round-0000{number}", commits.EARLIER)
    newest = commits.newest(tmp_path, "digest", pytest.fail, key)
    assert commits.digests(tmp_path, newest, key) == expected
    without(tmp_path / "round-00001", commits.RELEASES)
    assert [one.releases for one in commits.digests(tmp_path, newest, key)] == [
        None, expected[1].releases, expected[2].releases
    ]  # fmt: skip
    (tmp_path / "round-00002" / commits.SILOS).write_text("{ }")
    with pytest.raises(InputError, match="round-00002: missing or damaged"):
        commits.digests(tmp_path, newest, key)
